// SPDX-License-Identifier: Apache-2.0

// Resetting the connections that do not read, for `unload --force`.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/diag"
	"github.com/podshunt/podshunt/agent/explain"
	"github.com/podshunt/podshunt/api"
)

// resetTimeout bounds what --force does after the timeout: to reset connections and
// to complete the unload, both of which take moments.
const resetTimeout = 30 * time.Second

// unloader runs an unload, and has what it needs to reset connections.
type unloader struct {
	datapath       *datapath.Datapath
	view           *explain.View
	force          bool
	attachmentsDir string
	proc           string
}

// run unloads. With force, it resets connections that have not read their redirected
// bytes when ctx ends, and then completes the unload.
func (u unloader) run(ctx context.Context) (api.UnloadResult, error) {
	waiting, err := u.datapath.Unload(ctx)
	result := api.UnloadResult{Waiting: u.view.Paired(waiting)}
	if len(waiting) > 0 && u.force && errors.Is(err, context.DeadlineExceeded) {
		reset, over, resetErr := u.reset(waiting)
		u.datapath.GiveUp(append(over, reset...))
		result.Reset = u.view.Paired(reset)
		if resetErr != nil {
			result.ResetError = resetErr.Error()
		}
		again, cancel := context.WithTimeout(context.WithoutCancel(ctx), resetTimeout)
		defer cancel()
		if resetErr != nil {
			cancel() // some are waited for: look once
		}
		waiting, err = u.datapath.Unload(again)
		result.Waiting = u.view.Paired(waiting)
	}
	if len(waiting) > 0 {
		return result, nil
	}
	result.Done, result.Left = err == nil, u.datapath.Left()
	return result, err
}

// reset resets the sockets of flows that have redirected bytes to read. It returns
// the flows that it has reset, those that have ended by themselves, and an error if
// there are others.
func (u unloader) reset(flows []datapath.Flow) (reset, over []datapath.Flow, err error) {
	sockets := map[uint64]map[uint64]bool{} // by netns: those to reset
	want := func(netns, cookie uint64, redirected bool) {
		if !redirected {
			return
		}
		if sockets[netns] == nil {
			sockets[netns] = map[uint64]bool{}
		}
		sockets[netns][cookie] = true
	}
	for _, f := range flows {
		want(f.ClientNetns, f.ID, f.ToClient.Redirected)
		want(f.ServerNetns, f.ServerID, f.ToServer.Redirected)
	}
	paths := u.netnsPaths(sockets)
	done, failed := map[uint64]bool{}, map[uint64]bool{}
	var errs []error
	for cookie, wanted := range sockets {
		err := fmt.Errorf("the network namespace with cookie %d is not found by its pod's attachment, nor by a process", cookie)
		if path, ok := paths[cookie]; ok {
			err = resetSockets(path, wanted, done)
		}
		if err != nil {
			failed[cookie] = true
			errs = append(errs, err)
		}
	}
	for _, f := range flows {
		switch {
		case done[f.ID] || done[f.ServerID]:
			reset = append(reset, f)
		case !failed[f.ClientNetns] && !failed[f.ServerNetns]:
			over = append(over, f)
		}
	}
	return reset, over, errors.Join(errs...)
}

// netnsPaths finds network namespaces by their cookies, among the pods that the
// agent knows, the attachments, and the processes of the node.
func (u unloader) netnsPaths(wanted map[uint64]map[uint64]bool) map[uint64]string {
	found := map[uint64]string{}
	try := func(path string) {
		cookie, err := datapath.NetnsCookie(path)
		if err == nil && wanted[cookie] != nil {
			found[cookie] = path
		}
	}
	for _, p := range u.view.Pods() {
		if wanted[p.NetnsCookie] != nil {
			try(p.Netns)
		}
	}
	files, _ := filepath.Glob(filepath.Join(u.attachmentsDir, "*.json")) // the pattern is valid
	for _, file := range files {
		if len(found) == len(wanted) {
			return found
		}
		var a api.Attachment
		if data, err := os.ReadFile(file); err == nil && json.Unmarshal(data, &a) == nil {
			try(a.Netns)
		}
	}
	processes, _ := os.ReadDir(u.proc) // without it nothing is found there
	seen := map[string]bool{}
	for _, p := range processes {
		if len(found) == len(wanted) {
			return found
		}
		path := filepath.Join(u.proc, p.Name(), "ns", "net")
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		if name, err := os.Readlink(path); err == nil && !seen[name] {
			seen[name] = true
			try(path)
		}
	}
	return found
}

// resetSockets resets the TCP sockets with the wanted cookies in the network
// namespace at path, and notes them in done. It ignores sockets that are gone: they
// have been closed.
func resetSockets(path string, wanted, done map[uint64]bool) error {
	conn, err := diag.Open(path)
	if err != nil {
		return err
	}
	defer conn.Close()
	found, err := listAll(conn)
	if err != nil {
		return err
	}
	for _, s := range found {
		if !wanted[s.Cookie] {
			continue
		}
		err := conn.Reset(s)
		if errors.Is(err, unix.ENOENT) {
			continue // closed meanwhile
		}
		if errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("this kernel cannot reset connections from outside (it is built without CONFIG_INET_DIAG_DESTROY): end the programs that do not read: %w", err)
		}
		if err != nil {
			return err
		}
		done[s.Cookie] = true
	}
	return nil
}

// listAll lists the sockets in any state. It asks again if the kernel interrupted a
// list, which may then lack some.
func listAll(conn *diag.Conn) (found []diag.Socket, err error) {
	for range 10 {
		found = nil
		err = conn.Each(diag.All, func(s *diag.Socket) { found = append(found, *s) })
		if !errors.Is(err, diag.ErrInterrupted) {
			break
		}
	}
	return found, err
}
