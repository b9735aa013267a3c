// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/podshunt/podshunt/api"
)

// stamp changes when a file does. For a network namespace it may also change
// without that; then the cookie tells.
type stamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

func readStamp(path string) (stamp, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return stamp{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return stamp{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}, nil
}

// entry is the file of an attachment and what is known of the pod's network
// namespace. Without a file it stands for a pod that was found otherwise.
type entry struct {
	file       stamp
	attachment api.Attachment
	// fileErr is why the file cannot be used; the rest is not valid then.
	fileErr error

	netns  stamp
	cookie uint64
	// netnsErr is why the cookie cannot be read at present; a cookie read before stays valid.
	netnsErr error
	// refused is why a process that may look like the pod's does not count.
	refused error

	// told is what was last logged about the attachment.
	told string
}

// read reads the cookie of the pod's network namespace if it may have changed. It
// returns false if the namespace is not there any more.
func (e *entry) read(cookieOf func(path string) (uint64, error)) bool {
	now, err := readStamp(e.attachment.Netns)
	if err == nil && now == e.netns {
		return true
	}
	var cookie uint64
	if err == nil {
		cookie, err = cookieOf(e.attachment.Netns)
	}
	if errors.Is(err, fs.ErrNotExist) || err == nil && e.cookie != 0 && e.cookie != cookie {
		return false
	}
	e.netnsErr = err
	if err == nil {
		e.netns, e.cookie = now, cookie
	}
	return true
}

// readAttachments returns an entry for every file in dir, taken from old where
// the file has not changed.
func readAttachments(dir string, old map[string]*entry) (map[string]*entry, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return old, err
	}
	entries := make(map[string]*entry, len(files))
	for _, file := range files {
		name := file.Name()
		// Files appear by a rename; a dot starts the name that they are written under.
		if strings.HasPrefix(name, ".") || !strings.HasSuffix(name, ".json") {
			continue
		}
		path := filepath.Join(dir, name)
		now, err := readStamp(path)
		if e := old[name]; err == nil && e != nil && e.file == now {
			entries[name] = e
			continue
		}
		e := &entry{file: now, fileErr: err}
		if err == nil {
			e.attachment, e.fileErr = readAttachment(path)
		}
		if !errors.Is(e.fileErr, fs.ErrNotExist) {
			entries[name] = e
		}
	}
	return entries, nil
}

func readAttachment(path string) (api.Attachment, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return api.Attachment{}, err
	}
	var a api.Attachment
	if err := json.Unmarshal(data, &a); err != nil {
		return api.Attachment{}, fmt.Errorf("decode %s: %w", path, err)
	}
	if want := a.FileName(); want != filepath.Base(path) {
		return api.Attachment{}, fmt.Errorf("decode %s: its content belongs in %s", path, want)
	}
	return a, nil
}

// writeAttachment publishes the attachment's file in one step.
func writeAttachment(dir string, a api.Attachment) error {
	data, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("encode attachment: %w", err)
	}
	temp, err := os.CreateTemp(dir, ".*.tmp")
	if err != nil {
		return err
	}
	_, err = temp.Write(data)
	err = errors.Join(err, temp.Close())
	if err == nil {
		err = os.Rename(temp.Name(), filepath.Join(dir, a.FileName()))
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp.Name()))
	}
	return nil
}

// removeAttachment deletes an attachment's file; that it is gone already is no error.
func removeAttachment(dir, name string) error {
	if err := os.Remove(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
