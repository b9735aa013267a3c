// SPDX-License-Identifier: Apache-2.0

// Package server serves the CNI plugin and the command line on the agent's unix
// socket: the routes of api, nothing else. It checks requests, and leaves every
// decision to the interfaces Attachments and Node. On TCP ports it serves probes and
// metrics.
package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/podshunt/podshunt/api"
)

// maxBody bounds a request's body in bytes. A GC lists every attachment of the node;
// each takes about 150 bytes.
const maxBody = 1 << 20

// Attachments handles the plugin's requests.
type Attachments interface {
	Put(api.Attachment) (api.Admission, error)
	Remove(api.AttachmentID) error
	Collect(api.GCRequest) error
}

// Node handles the command line's requests.
type Node interface {
	Status() (api.Status, error)
	// Flows returns the flows that the selector chooses.
	Flows(context.Context, api.Selector) ([]api.Flow, error)
	Forget(api.Selector) (api.ForgetResult, error)
	// Unload returns once nothing is left, or when ctx ends; with force, soon after ctx
	// ends.
	Unload(ctx context.Context, force bool) (api.UnloadResult, error)
	// Uninstall takes the plugin out of the CNI configuration, and then does what
	// Unload does.
	Uninstall(ctx context.Context, force bool) (api.UnloadResult, error)
}

// Listen makes the socket at path and the directories above it. It replaces a socket
// file that nobody serves. It returns an error if somebody serves it, or if
// api.CheckSocket does not accept the path.
func Listen(path string) (net.Listener, error) {
	if err := api.CheckSocket(path); err != nil {
		return nil, fmt.Errorf("listen on %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: it is served by another process", path), conn.Close())
	}
	// Make it under another name, so that nobody can connect before the mode is
	// right.
	temp := path + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temp, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(temp, 0o600)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close(), os.Remove(temp))
	}
	return l, nil
}

// Serve answers on l until ctx ends, and closes l. Requests that are being served
// then have two seconds to end.
func Serve(ctx context.Context, l net.Listener, attachments Attachments, node Node, log *slog.Logger) error {
	// No ReadTimeout or WriteTimeout: an unload takes as long as its caller
	// wants, and a ReadTimeout would cancel its context.
	return serve(ctx, l, &http.Server{
		Handler: handler(attachments, node, log), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute,
	}, log)
}

func serve(ctx context.Context, l net.Listener, s *http.Server, log *slog.Logger) error {
	s.BaseContext = func(net.Listener) context.Context { return ctx }
	s.ErrorLog = slog.NewLogLogger(log.Handler(), slog.LevelWarn)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if s.Shutdown(grace) != nil {
		// Close the connections of requests that are still not answered.
		return s.Close()
	}
	return nil
}

func handler(attachments Attachments, node Node, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("PUT "+api.PathAttachments, func(w http.ResponseWriter, r *http.Request) {
		var a api.Attachment
		if !decode(w, r, &a, func() error { return errors.Join(checkID(a.AttachmentID), checkNetns(a.Netns)) }) {
			return
		}
		start := time.Now()
		admission, err := attachments.Put(a)
		log.Info("plugin add", append(facts(a.AttachmentID), "pod", a.Pod.String(), "netns", a.Netns,
			"enrolled", admission.Enrolled, "reason", admission.Message, "took", time.Since(start).String())...)
		answer(w, log, admission, err)
	})
	mux.HandleFunc("DELETE "+api.PathAttachments, func(w http.ResponseWriter, r *http.Request) {
		var id api.AttachmentID
		if !decode(w, r, &id, func() error { return checkID(id) }) {
			return
		}
		err := attachments.Remove(id)
		log.Info("plugin del", facts(id)...)
		answer(w, log, struct{}{}, err)
	})
	mux.HandleFunc("POST "+api.PathGC, func(w http.ResponseWriter, r *http.Request) {
		var req api.GCRequest
		if !decode(w, r, &req, func() error { return required("network", req.Network) }) {
			return
		}
		err := attachments.Collect(req)
		log.Debug("plugin gc", "network", req.Network, "valid", len(req.Valid))
		answer(w, log, struct{}{}, err)
	})
	mux.HandleFunc("GET "+api.PathStatus, func(w http.ResponseWriter, _ *http.Request) {
		status, err := node.Status()
		answer(w, log, status, err)
	})
	mux.HandleFunc("GET "+api.PathFlows, func(w http.ResponseWriter, r *http.Request) {
		chosen, err := api.ParseSelector(r.URL.Query())
		if err != nil {
			refuse(w, http.StatusBadRequest, err)
			return
		}
		flows, err := node.Flows(r.Context(), chosen)
		if err != nil {
			answer(w, log, nil, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if err := writeFlows(w, flows); err != nil {
			log.Debug("answer not sent", "err", err)
		}
	})
	mux.HandleFunc("POST "+api.PathForget, func(w http.ResponseWriter, r *http.Request) {
		chosen, err := api.ParseSelector(r.URL.Query())
		if err != nil {
			refuse(w, http.StatusBadRequest, err)
			return
		}
		result, err := node.Forget(chosen)
		log.Info("forget", "pod", chosen.Pod, "port", chosen.Port, "forgotten", result.Forgotten)
		answer(w, log, result, err)
	})
	remove := func(what string, do func(context.Context, bool) (api.UnloadResult, error)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			timeout, err := time.ParseDuration(r.URL.Query().Get("timeout"))
			if err != nil || timeout <= 0 {
				refuse(w, http.StatusBadRequest, errors.New(`query parameter timeout: accepted is a positive duration such as "30s"`))
				return
			}
			force, err := strconv.ParseBool(cmp.Or(r.URL.Query().Get("force"), "false"))
			if err != nil {
				refuse(w, http.StatusBadRequest, errors.New(`query parameter force: accepted are "true" and "false"`))
				return
			}
			ctx, cancel := context.WithTimeout(r.Context(), timeout)
			defer cancel()
			log.Info("removal", "what", what, "timeout", timeout.String(), "force", force)
			result, err := do(ctx, force)
			log.Info("removal ended", "what", what, "done", result.Done, "waiting", len(result.Waiting), "reset", len(result.Reset), "left", result.Left)
			answer(w, log, result, err)
		}
	}
	mux.HandleFunc("POST "+api.PathUnload, remove("unload", node.Unload))
	mux.HandleFunc("POST "+api.PathUninstall, remove("uninstall", node.Uninstall))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		refuse(w, http.StatusNotFound, fmt.Errorf("no such request: %s %s", r.Method, r.URL.Path))
	})
	return mux
}

// facts returns the log attributes of an attachment.
func facts(id api.AttachmentID) []any {
	return []any{"network", id.Network, "container_id", id.ContainerID, "ifname", id.IfName}
}

func checkID(id api.AttachmentID) error {
	return errors.Join(required("network", id.Network), required("containerID", id.ContainerID), required("ifName", id.IfName))
}

func checkNetns(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("netns %q: accepted is an absolute path", path)
	}
	return nil
}

func required(key, value string) error {
	if value == "" {
		return fmt.Errorf("%s: required", key)
	}
	return nil
}

// decode reads the one JSON value of a request and checks it. If it returns false it
// has answered the request. It ignores unknown keys: in an upgrade, a node may have
// the new plugin before the new agent.
func decode(w http.ResponseWriter, r *http.Request, to any, check func() error) bool {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	err := d.Decode(to)
	if err == nil {
		if _, more := d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("more than one JSON value")
		}
	}
	if err == nil {
		err = check()
	}
	if err != nil {
		refuse(w, http.StatusBadRequest, fmt.Errorf("request body: %w", err))
	}
	return err == nil
}

func answer(w http.ResponseWriter, log *slog.Logger, body any, err error) {
	if err != nil {
		log.Warn("request failed", "err", err)
		refuse(w, http.StatusInternalServerError, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(body); err != nil {
		log.Debug("answer not sent", "err", err)
	}
}

func writeFlows(w io.Writer, flows []api.Flow) error {
	list, err := api.NewFlowListWriter(w, "")
	if err != nil {
		return err
	}
	for _, f := range flows {
		if err := list.Write(f); err != nil {
			return err
		}
	}
	return list.Close()
}

func refuse(w http.ResponseWriter, code int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	// If this fails, the caller is gone.
	_ = json.NewEncoder(w).Encode(api.Error{Error: err.Error()})
}
