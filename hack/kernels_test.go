// SPDX-License-Identifier: Apache-2.0

package hack_test

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestGuardsAreTested: a test that does nothing where trampolines are refused is run on
// kernels that allow them. Nobody else would notice that it never runs.
func TestGuardsAreTested(t *testing.T) {
	script, err := os.ReadFile("kernels/test.sh")
	if err != nil {
		t.Fatal(err)
	}
	list := regexp.MustCompile(`(?m)^\t\[datapath\]='(.*)'$`).FindSubmatch(script)
	if list == nil {
		t.Fatal("kernels/test.sh has no list of the datapath's tests")
	}
	listed := regexp.MustCompile(string(list[1]))
	files, err := filepath.Glob("../agent/datapath/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, name := range files {
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, source, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || !strings.HasPrefix(f.Name.Name, "Test") {
				continue
			}
			body := source[f.Pos()-file.FileStart : f.End()-file.FileStart]
			if !bytes.Contains(body, []byte(`hazard(t, "no-trampolines")`)) {
				continue
			}
			found++
			if !listed.MatchString(f.Name.Name) {
				t.Errorf("%s: add it to the datapath's tests in hack/kernels/test.sh", f.Name.Name)
			}
		}
	}
	if found < 5 {
		t.Errorf("got %d tests that need trampolines, want more: how they say so has changed", found)
	}
}
