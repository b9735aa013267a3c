// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"runtime"
)

// peerImage is the image of every pod of the suite, and of the sandboxes.
const peerImage = "localhost/peer:e2e"

type object = map[string]any

// imageArchive returns an OCI archive with the program at file as /peer.
func imageArchive(file string) ([]byte, error) {
	program, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	layer, err := archive(entry{"peer", program, 0o755})
	if err != nil {
		return nil, err
	}
	var blobs []entry
	blob := func(mediaType string, content []byte) object {
		sum := sha256.Sum256(content)
		name := hex.EncodeToString(sum[:])
		blobs = append(blobs, entry{"blobs/sha256/" + name, content, 0o644})
		return object{"mediaType": mediaType, "digest": "sha256:" + name, "size": len(content)}
	}
	layerBlob := blob("application/vnd.oci.image.layer.v1.tar", layer)
	config, err1 := json.Marshal(object{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": object{"Entrypoint": []string{"/peer"}, "Cmd": []string{"pause"}},
		"rootfs": object{"type": "layers", "diff_ids": []any{layerBlob["digest"]}},
	})
	manifest, err2 := json.Marshal(object{
		"schemaVersion": 2,
		"config":        blob("application/vnd.oci.image.config.v1+json", config),
		"layers":        []any{layerBlob},
	})
	manifestBlob := blob("application/vnd.oci.image.manifest.v1+json", manifest)
	manifestBlob["annotations"] = object{"io.containerd.image.name": peerImage}
	index, err3 := json.Marshal(object{"schemaVersion": 2, "manifests": []any{manifestBlob}})
	for _, err := range []error{err1, err2, err3} {
		if err != nil {
			return nil, err
		}
	}
	return archive(append([]entry{
		{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644},
		{"index.json", index, 0o644},
	}, blobs...)...)
}

type entry struct {
	name    string
	content []byte
	mode    int64
}

func archive(entries ...entry) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		if err := w.WriteHeader(&tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.content))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(e.content); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), w.Close()
}
