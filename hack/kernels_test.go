// SPDX-License-Identifier: Apache-2.0

package hack_test

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestGuardsAreTested: a test that does nothing where trampolines, or the iterator of watched
// connections, are refused is run on kernels that allow them. Nobody else would notice that it
// never runs.
func TestGuardsAreTested(t *testing.T) {
	script, err := os.ReadFile("kernels/test.sh")
	if err != nil {
		t.Fatal(err)
	}
	lists := regexp.MustCompile(`(?m)^\t\[(?:datapath|once)\]='(.*)'$`).FindAllSubmatch(script, -1)
	if len(lists) != 2 {
		t.Fatalf("kernels/test.sh has %d lists of the datapath's tests, want 2", len(lists))
	}
	listed := regexp.MustCompile(string(lists[0][1]) + "|" + string(lists[1][1]))
	files, err := filepath.Glob("../agent/datapath/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]int{}
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
			var needs bool
			for _, says := range []string{`hazard(t, "no-trampolines")`, "noWatch(t)"} {
				if bytes.Contains(body, []byte(says)) {
					needs = true
					found[says]++
				}
			}
			if !needs {
				continue
			}
			if !listed.MatchString(f.Name.Name) {
				t.Errorf("%s: add it to the datapath's tests in hack/kernels/test.sh", f.Name.Name)
			}
		}
	}
	if len(found) < 2 || slices.Min(slices.Collect(maps.Values(found))) < 5 {
		t.Errorf("got %v tests that need such a kernel, want more: how they say so has changed", found)
	}
}
