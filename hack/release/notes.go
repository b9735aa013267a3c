// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

const unreleased = "Unreleased"

// notes returns what CHANGELOG.md says of the version. A version with a suffix, such as
// 1.2.3-rc.1, that has no section is what is unreleased.
func (b build) notes() (string, error) {
	path := filepath.Join(b.top, "CHANGELOG.md")
	changelog, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	sections := map[string]string{}
	for _, section := range strings.Split("\n"+string(changelog), "\n## ")[1:] {
		heading, text, _ := strings.Cut(section, "\n")
		if title := strings.Fields(heading); len(title) > 0 {
			sections[title[0]] = strings.TrimSpace(text)
		}
	}
	text, found := sections[b.version]
	if !found && strings.Contains(b.version, "-") {
		text, found = sections[unreleased]
	}
	if !found || text == "" {
		return "", fmt.Errorf("%s has no text below a heading %q: rename %q", path, "## "+b.version, "## "+unreleased)
	}
	return text, nil
}

// relative is the target of a link to a file of the repository.
var relative = regexp.MustCompile(`\]\(([^):#]+)([^):]*)\)`)

// releaseNotes are the notes for whoever meets them outside of the repository.
func (b build) releaseNotes() (string, error) {
	notes, err := b.notes()
	if err != nil {
		return "", err
	}
	notes = relative.ReplaceAllString(notes, "]("+repository+"/blob/v"+b.version+"/$1$2)")
	return fmt.Sprintf(`%s

## Install

    kubectl create namespace podshunt
    kubectl label namespace podshunt pod-security.kubernetes.io/enforce=privileged
    helm install podshunt oci://ghcr.io/podshunt/charts/podshunt --version %s --namespace podshunt --wait

[SECURITY.md](%s/blob/v%[2]s/SECURITY.md#releases) says how to verify what is below.
`, notes, b.version, repository), nil
}

var (
	emphasis = regexp.MustCompile("\\*\\*|`")
	link     = regexp.MustCompile(`\[([^]]*)\]\([^)]*\)`)
)

// changesOf returns the items of a section, each in one line and without markup.
func changesOf(notes string) []string {
	var changes []string
	for _, item := range strings.Split("\n"+notes, "\n- ")[1:] {
		item, _, _ = strings.Cut(item, "\n\n")
		item = strings.Join(strings.Fields(item), " ")
		changes = append(changes, emphasis.ReplaceAllString(link.ReplaceAllString(item, "$1"), ""))
	}
	return changes
}
