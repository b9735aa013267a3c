// SPDX-License-Identifier: Apache-2.0

package hack_test

import (
	"os"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// TestDenyLists: depguard asks only the entry that sorts next before an import. So one that
// begins as another does hides it from what sorts behind: with agent/ and agent/datapath,
// agent/nodefs is accepted.
func TestDenyLists(t *testing.T) {
	content, err := os.ReadFile("../.golangci.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var config struct {
		Linters struct {
			Settings struct {
				Depguard struct {
					Rules map[string]struct {
						Deny []struct{ Pkg string }
					}
				}
			}
		}
	}
	if err := yaml.Unmarshal(content, &config); err != nil {
		t.Fatal(err)
	}
	lists := 0
	for name, rule := range config.Linters.Settings.Depguard.Rules {
		for _, hidden := range rule.Deny {
			lists++
			for _, by := range rule.Deny {
				if by.Pkg != hidden.Pkg && strings.HasPrefix(by.Pkg, hidden.Pkg) {
					t.Errorf("%s: %s is hidden by %s: remove that one", name, hidden.Pkg, by.Pkg)
				}
			}
		}
	}
	if lists < 20 {
		t.Errorf("got %d entries, want more: the file has changed", lists)
	}
}
