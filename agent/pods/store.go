// SPDX-License-Identifier: Apache-2.0

// This file keeps the attachments: in memory, and written through to files in a
// directory. A file that somebody else writes or deletes, as the plugin does when the
// agent does not answer, counts from the next refresh on. entry also has what is known
// of the network namespace that an attachment names.

package pods

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/podshunt/podshunt/api"
)

// stamp changes when a file does. A network namespace's may also change while that
// stays the same: then compare the cookie.
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

// entry is an attachment, with what is known of its file and of the pod's network
// namespace. A search has an entry without a file.
type entry struct {
	file       stamp
	attachment api.Attachment
	// fileErr says why the file cannot be used; the other fields are not valid
	// then.
	fileErr error

	netns  stamp
	cookie uint64
	// netnsErr says why the cookie cannot be read at present; a cookie that was read before
	// stays valid.
	netnsErr error
	// refused says why a process in a cgroup of the pod's name does not count.
	refused error

	// lastLogged has what was last logged about the pod. logged is set once fileErr has been
	// logged.
	lastLogged string
	logged     bool
}

// read reads the cookie of the pod's network namespace if it may have changed. It
// returns false if the namespace is gone.
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

// store is a directory of attachments and what is in it.
type store struct {
	dir     string
	entries map[string]*entry // by file name
}

// refresh reads what others have changed in the directory, and returns true if
// anything has changed. After an error, the entries are as before.
func (s *store) refresh() (changed bool, err error) {
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return false, err
	}
	entries := make(map[string]*entry, len(files))
	for _, file := range files {
		name := file.Name()
		// Skip files that are being written: their names start with a dot until they
		// are renamed.
		if strings.HasPrefix(name, ".") || !strings.HasSuffix(name, ".json") {
			continue
		}
		path := filepath.Join(s.dir, name)
		now, err := readStamp(path)
		if e := s.entries[name]; err == nil && e != nil && e.file == now {
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
	changed = !maps.Equal(entries, s.entries)
	s.entries = entries
	return changed, nil
}

// put writes an attachment, and makes a new entry for it, even if it equals the former
// one: its network namespace may be another.
func (s *store) put(a api.Attachment) error {
	file, err := writeAttachment(s.dir, a)
	if err != nil {
		return err
	}
	s.entries[a.FileName()] = &entry{file: file, attachment: a}
	return nil
}

// remove deletes an attachment. It succeeds if there is none.
func (s *store) remove(name string) error {
	if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	delete(s.entries, name)
	return nil
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

// writeAttachment publishes the attachment's file by a rename. The stamp is zero if
// somebody has replaced the file since.
func writeAttachment(dir string, a api.Attachment) (stamp, error) {
	data, err := json.Marshal(a)
	if err != nil {
		return stamp{}, fmt.Errorf("encode attachment: %w", err)
	}
	temp, err := os.CreateTemp(dir, ".*.tmp")
	if err != nil {
		return stamp{}, err
	}
	_, err = temp.Write(data)
	err = errors.Join(err, temp.Close())
	var ours stamp
	if err == nil {
		ours, err = readStamp(temp.Name())
	}
	path := filepath.Join(dir, a.FileName())
	if err == nil {
		err = os.Rename(temp.Name(), path)
	}
	if err != nil {
		return stamp{}, errors.Join(err, os.Remove(temp.Name()))
	}
	// Read the stamp again, as the rename has changed the ctime.
	if now, err := readStamp(path); err == nil && now.dev == ours.dev && now.ino == ours.ino {
		return now, nil
	}
	return stamp{}, nil
}
