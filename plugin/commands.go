// SPDX-License-Identifier: Apache-2.0

// The verbs of CNI.

package main

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/podshunt/podshunt/api"
)

func add(args *skel.CmdArgs, stdout io.Writer) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	printed, result, err := conf.prevResult()
	if err != nil {
		return err
	}
	announce(conf.own, conf.attachment(args, result))
	if _, err := stdout.Write(printed); err != nil {
		return types.NewError(types.ErrIOFailure, "write result", err.Error())
	}
	return nil
}

// check announces the attachment again, in case the agent has missed its ADD.
func check(args *skel.CmdArgs) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	_, result, err := conf.prevResult()
	if err != nil {
		return err
	}
	announce(conf.own, conf.attachment(args, result))
	return nil
}

func del(args *skel.CmdArgs) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil {
		// Not an error: a runtime undoes a failed ADD with the same section, from the
		// last plugin to the first, and an error would keep the other plugins from
		// releasing what they hold.
		return nil
	}
	id := conf.attachmentID(args)
	// If no agent answers, it finds out when the network namespace is gone; an
	// error would only make the runtime keep a dead pod.
	_ = tell(conf.own, "DELETE", api.PathAttachments, id, nil)
	_ = os.Remove(filepath.Join(conf.own.AttachmentsDir, id.FileName()))
	return nil
}

func gc(args *skel.CmdArgs) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	request := api.GCRequest{Network: conf.Name, Valid: []api.AttachmentID{}}
	valid := map[api.AttachmentID]bool{}
	for _, v := range conf.ValidAttachments {
		id := api.AttachmentID{Network: conf.Name, ContainerID: v.ContainerID, IfName: v.IfName}
		request.Valid = append(request.Valid, id)
		valid[id] = true
	}
	_ = tell(conf.own, "POST", api.PathGC, request, nil)
	files, _ := os.ReadDir(conf.own.AttachmentsDir)
	for _, file := range files {
		path := filepath.Join(conf.own.AttachmentsDir, file.Name())
		var waiting api.Attachment
		content, err := os.ReadFile(path)
		if err != nil || json.Unmarshal(content, &waiting) != nil {
			continue
		}
		if waiting.Network == conf.Name && !valid[waiting.AttachmentID] {
			_ = os.Remove(path)
		}
	}
	return nil
}

// status checks only our configuration. CNI asks whether an ADD can be served, and
// an ADD needs no agent.
func status(args *skel.CmdArgs) error {
	_, err := parseConfig(args.StdinData)
	return err
}

// announce sends an attachment to the agent, or, if no agent answers, writes it to a
// file for the next agent. If that fails as well, the pod stays on TCP.
func announce(conf api.PluginConf, attachment api.Attachment) {
	var admission api.Admission // Whatever does not answer with one is not our agent.
	if tell(conf, "PUT", api.PathAttachments, attachment, &admission) != nil {
		_ = leave(conf.AttachmentsDir, attachment)
	}
}

// leave publishes the attachment's file by a rename, so that a reader finds all of it
// or nothing.
func leave(dir string, attachment api.Attachment) error {
	content, err := json.Marshal(attachment)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	path := filepath.Join(dir, attachment.FileName())
	temporary := path + ".plugin"
	if err := os.WriteFile(temporary, content, 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}
