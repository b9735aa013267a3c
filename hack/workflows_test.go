// SPDX-License-Identifier: Apache-2.0

package hack_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// TestWorkflows: what GitHub runs is what the Makefile and .ci/run run, actions are of a
// commit, and a workflow may read only, unless a job says what it writes.
func TestWorkflows(t *testing.T) {
	makefile, err := os.ReadFile("../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	targets := map[string]bool{}
	for _, found := range regexp.MustCompile(`(?m)^([a-z-]+):.* ## `).FindAllSubmatch(makefile, -1) {
		targets[string(found[1])] = true
	}
	files, err := filepath.Glob("../.github/workflows/*")
	if err != nil || len(files) == 0 {
		t.Fatalf("got no workflows, and error %v", err)
	}
	pinned := regexp.MustCompile(`^[\w-]+/[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$`)
	ran := map[string]bool{}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range regexp.MustCompile(`(?m)uses: (.*)$`).FindAllStringSubmatch(string(content), -1) {
			if !pinned.MatchString(found[1]) {
				t.Errorf("%s uses %s, want owner/action@COMMIT # vX.Y.Z", file, found[1])
			}
		}
		var workflow struct {
			Permissions map[string]string
			Jobs        map[string]struct {
				Strategy struct{ Matrix struct{ Target []string } }
				Steps    []struct{ Run string }
			}
		}
		if err := yaml.Unmarshal(content, &workflow); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if len(workflow.Permissions) != 1 || workflow.Permissions["contents"] != "read" {
			t.Errorf("%s: got permissions %v, want contents: read", file, workflow.Permissions)
		}
		for _, job := range workflow.Jobs {
			for _, step := range job.Steps {
				command, found := strings.CutPrefix(step.Run, "make ")
				if !found {
					continue
				}
				made := []string{strings.Fields(command)[0]}
				if strings.Contains(command, "matrix.target") {
					made = job.Strategy.Matrix.Target
				}
				for _, target := range made {
					ran[target] = true
					if !targets[target] {
						t.Errorf("%s: the Makefile has no target %s", file, target)
					}
				}
			}
		}
	}
	ci, err := os.ReadFile("../.ci/run")
	if err != nil {
		t.Fatal(err)
	}
	for _, found := range regexp.MustCompile(`(?m)^step make ([a-z-]+)`).FindAllSubmatch(ci, -1) {
		if !ran[string(found[1])] {
			t.Errorf("no workflow runs make %s, which .ci/run does", found[1])
		}
	}
	if !ran["release"] || !ran["publish"] {
		t.Error("no workflow runs make release and make publish")
	}
}
