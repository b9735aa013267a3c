// SPDX-License-Identifier: Apache-2.0

// The attachments: kept in memory, written through to the files of a directory. A file
// that somebody else writes or deletes, as the plugin does when the agent does not
// answer, counts from the next refresh on. So do the network namespaces that they name.

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

	// lastLogged is what was last logged about the pod; logged is set when fileErr has been.
	lastLogged string
	logged     bool
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

// store is a directory of attachments and what is in it.
type store struct {
	dir     string
	entries map[string]*entry // by file name
}

// refresh takes up what others have changed in the directory, and returns true if that
// is anything. With an error, the entries are what they were.
func (s *store) refresh() (changed bool, err error) {
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return false, err
	}
	entries := make(map[string]*entry, len(files))
	for _, file := range files {
		name := file.Name()
		// Files appear by a rename; a dot starts the name that they are written under.
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

// put writes an attachment. It is a new entry also where it is the same as before: its
// network namespace may be another one.
func (s *store) put(a api.Attachment) error {
	file, err := writeAttachment(s.dir, a)
	if err != nil {
		return err
	}
	s.entries[a.FileName()] = &entry{file: file, attachment: a}
	return nil
}

// remove deletes an attachment; that it is gone already is no error.
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

// writeAttachment publishes the attachment's file in one step. The stamp is zero if
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
	// The rename has changed the ctime.
	if now, err := readStamp(path); err == nil && now.dev == ours.dev && now.ino == ours.ino {
		return now, nil
	}
	return stamp{}, nil
}
