// SPDX-License-Identifier: Apache-2.0

// The plugin's section of the CNI configuration.

package api

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// AttachmentsDir has one file per attachment, named by AttachmentID.FileName, which
// holds an Attachment as JSON. The agent writes it, or the plugin if no agent
// answers.
const AttachmentsDir = RunDir + "/attachments"

// PluginConf has the values of podshunt's own keys in its section of a CNI conflist.
// Every key is optional.
type PluginConf struct {
	// AgentSocket (key "agentSocket") is the agent's unix socket.
	AgentSocket string
	// AgentTimeout (key "agentTimeout") bounds how long a pod waits for the
	// agent.
	AgentTimeout time.Duration
	// AttachmentsDir (key "attachmentsDir") must be the directory that the agent
	// reads.
	AttachmentsDir string
}

// ParseConf reads the plugin's section of a conflist, as a runtime passes it.
// Keys of the CNI specification are let through, whatever they hold; any other
// key that is not ours, or a value that is not accepted, is an error that lists
// what is. All faults are reported together, and the PluginConf is zero then.
func ParseConf(section []byte) (PluginConf, error) {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(section, &keys); err != nil {
		return PluginConf{}, fmt.Errorf("decode plugin section: %w", err)
	}
	conf := PluginConf{AgentSocket: Socket, AgentTimeout: PluginTimeout, AttachmentsDir: AttachmentsDir}
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		var err error
		switch key {
		case "agentSocket":
			conf.AgentSocket, err = parsePath(keys[key])
			if err == nil {
				err = CheckSocket(conf.AgentSocket)
			}
		case "agentTimeout":
			conf.AgentTimeout, err = parseTimeout(keys[key])
		case "attachmentsDir":
			conf.AttachmentsDir, err = parsePath(keys[key])
		case "cniVersion", "name", "type", "args", "capabilities", "dns", "ipam", "prevResult", "runtimeConfig":
		default:
			if !strings.HasPrefix(key, "cni.dev/") {
				err = errors.New("unknown key; accepted are agentSocket, agentTimeout and attachmentsDir")
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%q: %w", key, err))
		}
	}
	if len(errs) > 0 {
		return PluginConf{}, errors.Join(errs...)
	}
	return conf, nil
}

// Section returns the plugin's section of a conflist: its type, and the keys
// whose values are not the defaults. ParseConf accepts it if the values are
// those that it accepts.
func (c PluginConf) Section() []byte {
	section := struct {
		Type           string `json:"type"`
		AgentSocket    string `json:"agentSocket,omitempty"`
		AgentTimeout   string `json:"agentTimeout,omitempty"`
		AttachmentsDir string `json:"attachmentsDir,omitempty"`
	}{Type: PluginType}
	if c.AgentSocket != Socket {
		section.AgentSocket = c.AgentSocket
	}
	if c.AgentTimeout != PluginTimeout {
		section.AgentTimeout = c.AgentTimeout.String()
	}
	if c.AttachmentsDir != AttachmentsDir {
		section.AttachmentsDir = c.AttachmentsDir
	}
	// Strings always marshal.
	text, _ := json.Marshal(section)
	return text
}

func parsePath(value json.RawMessage) (string, error) {
	var path string
	if err := json.Unmarshal(value, &path); err != nil || !filepath.IsAbs(path) {
		return "", fmt.Errorf("%s: accepted is an absolute path", value)
	}
	return path, nil
}

func parseTimeout(value json.RawMessage) (time.Duration, error) {
	var text string
	err1 := json.Unmarshal(value, &text)
	timeout, err2 := time.ParseDuration(text)
	if err1 != nil || err2 != nil || timeout < time.Millisecond || timeout > 10*time.Second {
		return 0, fmt.Errorf(`%s: accepted is a duration from "1ms" to "10s"`, value)
	}
	return timeout, nil
}

// FileName returns the name of the attachment's file. Different IDs have different
// names, and no container ID or network name can make it a path elsewhere.
func (id AttachmentID) FileName() string {
	sum := sha256.Sum256([]byte(id.Network + "\x00" + id.ContainerID + "\x00" + id.IfName))
	return hex.EncodeToString(sum[:16]) + ".json"
}
