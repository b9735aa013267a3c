// SPDX-License-Identifier: Apache-2.0

package hack_test

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// mostLines is how long a file of the product may be. One that has to be longer says
// why in its head, with the word "lines".
const mostLines = 400

// TestRooms: each file of the product begins with what lives there, for whoever looks
// for it, and none is so long that nobody finds it.
func TestRooms(t *testing.T) {
	var files []string
	for _, pattern := range []string{"plugin/*.go", "api/*.go", "agent/*.go", "agent/*/*.go", "bpf/*.[ch]"} {
		found, err := filepath.Glob("../" + pattern)
		if err != nil || len(found) == 0 {
			t.Fatalf("got no files %s and error %v", pattern, err)
		}
		files = append(files, found...)
	}
	// The licence, a comment, and the code, which a C header begins with its guard.
	head := regexp.MustCompile(`(?s)\A(?://go:build ignore\n)?(?://|/\*) SPDX[^\n]*\n\n((?://|/\*).*?)\n\n?(?:package|#ifndef|#include)`)
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		found := head.FindSubmatch(content)
		if found == nil || bytes.HasPrefix(found[1], []byte("//go:build")) {
			t.Errorf("%s does not begin with what lives there", file)
			continue
		}
		if n := bytes.Count(content, []byte("\n")); n > mostLines && !bytes.Contains(found[1], []byte("lines")) {
			t.Errorf("%s has %d lines, want %d at most, or a head that says why it has more", file, n, mostLines)
		}
	}
}
