// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDeleteBinary: the binary goes when no file names it any more.
func TestDeleteBinary(t *testing.T) {
	conf := `{"name": "net", "plugins": [{"type": "bridge"}, {"type": "podshunt"}]}`
	libcni, err := json.Marshal(map[string]any{"kind": "cniCacheV1", "config": []byte(conf)})
	if err != nil {
		t.Fatal(err)
	}
	other, err := json.Marshal(map[string]any{"kind": "cniCacheV1", "config": []byte(`{"name": "podshunt-net", "plugins": [{"type": "bridge"}]}`)})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, file, content string
		want                string // of the error
	}{
		{name: "nobody", file: "cache/results/net-1-eth0", content: string(other)},
		{name: "a pod's cache", file: "cache/results/net-1-eth0", content: string(libcni), want: "1 pods were started with it"},
		{name: "the cache of multus", file: "cache/multus/1", content: "[" + conf + "]", want: "1 pods were started with it"},
		{name: "a copy of the list", file: "conf/multus.d/00.json", content: conf, want: "still names podshunt"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			binary := filepath.Join(dir, "bin", "podshunt")
			for path, content := range map[string]string{binary: "x", filepath.Join(dir, tc.file): tc.content} {
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			del := func() error {
				return DeleteBinary(filepath.Join(dir, "conf"), filepath.Dir(binary), filepath.Join(dir, "cache"))
			}
			err := del()
			_, statErr := os.Stat(binary)
			if tc.want == "" {
				if err != nil || !os.IsNotExist(statErr) {
					t.Errorf("got error %v and %v, want the binary gone", err, statErr)
				}
			} else if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), filepath.Join(dir, tc.file)) || statErr != nil {
				t.Errorf("got error %v and %v, want one with %q and the binary there", err, statErr, tc.want)
			}
			if err := os.Remove(filepath.Join(dir, tc.file)); err != nil {
				t.Fatal(err)
			}
			if err := del(); err != nil {
				t.Errorf("once the file is gone, and again: %v", err)
			}
			if _, err := os.Stat(binary); !os.IsNotExist(err) {
				t.Errorf("got %v, want the binary gone", err)
			}
		})
	}
}
