// SPDX-License-Identifier: Apache-2.0

// Deleting the plugin's binary, once no runtime calls it any more.

package cniconf

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/podshunt/podshunt/api"
)

// DeleteBinary deletes the plugin's binary after an Uninstall. It deletes nothing, and returns
// an error that names them, while files still name the plugin: those that Uninstall remarks on,
// and below cacheDir what was run for pods that were started with the plugin. CRI-O and multus
// run that again when such a pod ends.
func DeleteBinary(confDir, binDir, cacheDir string) error {
	binary := filepath.Join(binDir, api.PluginType)
	remarks, err := mentions(confDir, binary)
	if err != nil {
		return err
	}
	if len(remarks) > 0 {
		return fmt.Errorf("%s stays: %s", binary, strings.Join(remarks, "; "))
	}
	var used []string
	err = filepath.WalkDir(cacheDir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return ignoreMissing(err)
		}
		data, err := readSome(path)
		if err == nil && namesPlugin(data) {
			used = append(used, path)
		}
		return ignoreMissing(err)
	})
	if err != nil {
		return fmt.Errorf("look for pods that were started with %s: %w", api.PluginType, err)
	}
	if len(used) > 0 {
		return fmt.Errorf("%s stays: %d pods were started with it, and may call it when they end (%s): repeat this when they are gone, such as after a drain",
			binary, len(used), strings.Join(used[:min(len(used), 3)], ", "))
	}
	if err := removeIfThere(binary); err != nil {
		return err
	}
	return syncDirIfThere(binDir)
}

// namesPlugin reports whether a file of a cache names the plugin. libcni writes the
// configuration of a pod in base64.
func namesPlugin(data []byte) bool {
	var cached struct {
		Config []byte `json:"config"`
	}
	_ = json.Unmarshal(data, &cached) // not all are libcni's
	name := []byte(`"` + api.PluginType + `"`)
	return bytes.Contains(data, name) || bytes.Contains(cached.Config, name)
}
