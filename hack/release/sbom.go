// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx"
	"github.com/spdx/tools-golang/spdx/v2/common"
)

const (
	repository = "https://github.com/podshunt/podshunt"
	licence    = "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)"
	noneStated = "NOASSERTION"
)

// programs are the binaries of every architecture.
var programs = []string{"podshunt", "podshunt-agent"}

// sbom returns a bill of materials, SPDX 2.3 in JSON: each binary, and the modules that
// it says it is linked from.
func (b build) sbom() ([]byte, error) {
	self := &spdx.Package{
		PackageName: "podshunt", PackageSPDXIdentifier: "podshunt", PackageVersion: b.version,
		PackageDownloadLocation: "git+" + repository + "@v" + b.version, PackageHomePage: repository,
		PackageLicenseConcluded: licence, PackageLicenseDeclared: licence, PackageCopyrightText: noneStated,
		PackageSupplier:       &common.Supplier{SupplierType: "Organization", Supplier: "podshunt"},
		PrimaryPackagePurpose: "APPLICATION", PackageSourceInfo: "built from commit " + b.revision,
		PackageExternalReferences: purl("github.com/podshunt/podshunt", "v"+b.version),
	}
	relations := []*spdx.Relationship{relation("DOCUMENT", spdx.RelationshipDescribes, self.PackageSPDXIdentifier)}
	modules := map[spdx.ElementID]*spdx.Package{}
	var files []*spdx.File
	all := sha256.New()
	for _, architecture := range slices.Sorted(maps.Keys(b.binaries)) {
		for _, program := range programs {
			path := filepath.Join(b.binaries[architecture], program)
			content, err := os.ReadFile(path)
			if err != nil {
				return nil, err
			}
			info, err := buildinfo.Read(bytes.NewReader(content))
			if err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
			all.Write(content)
			binary := binaryFile(architecture+"/"+program, content)
			files = append(files, binary)
			relations = append(relations, relation(self.PackageSPDXIdentifier, spdx.RelationshipContains, binary.FileSPDXIdentifier))
			for _, m := range append(info.Deps, &debug.Module{Path: "stdlib", Version: info.GoVersion}) {
				linked := module(m)
				modules[linked.PackageSPDXIdentifier] = linked
				relations = append(relations, relation(binary.FileSPDXIdentifier, spdx.RelationshipStaticLink, linked.PackageSPDXIdentifier))
			}
		}
	}
	packages := []*spdx.Package{self}
	for _, id := range slices.Sorted(maps.Keys(modules)) {
		packages = append(packages, modules[id])
	}
	var out bytes.Buffer
	err := spdxjson.Write(&spdx.Document{
		SPDXVersion: spdx.Version, DataLicense: spdx.DataLicense, SPDXIdentifier: "DOCUMENT",
		DocumentName: "podshunt-" + b.version,
		// Unique to what the document describes.
		DocumentNamespace: fmt.Sprintf("%s/spdx/podshunt-%s-%x", repository, b.version, all.Sum(nil)[:16]),
		CreationInfo: &spdx.CreationInfo{
			Creators: []common.Creator{{CreatorType: "Organization", Creator: "podshunt"}, {CreatorType: "Tool", Creator: "hack/release"}},
			Created:  b.created.UTC().Format(time.RFC3339),
		},
		Packages: packages, Files: files, Relationships: relations,
	}, &out, spdxjson.Indent("  "), spdxjson.EscapeHTML(false))
	return out.Bytes(), err
}

func relation(from spdx.ElementID, kind string, to spdx.ElementID) *spdx.Relationship {
	return &spdx.Relationship{
		RefA: common.DocElementID{ElementRefID: from}, Relationship: kind, RefB: common.DocElementID{ElementRefID: to},
	}
}

func binaryFile(name string, content []byte) *spdx.File {
	old, sum := sha1.Sum(content), sha256.Sum256(content) // SPDX asks for SHA-1
	return &spdx.File{
		FileName: "./" + name, FileSPDXIdentifier: elementID("file", name), FileTypes: []string{"BINARY"},
		Checksums: []common.Checksum{
			{Algorithm: common.SHA1, Value: hex.EncodeToString(old[:])},
			{Algorithm: common.SHA256, Value: hex.EncodeToString(sum[:])},
		},
		LicenseConcluded: noneStated, FileCopyrightText: noneStated,
	}
}

func module(m *debug.Module) *spdx.Package {
	if m.Replace != nil {
		m = m.Replace
	}
	version := m.Version
	if m.Path == "stdlib" {
		version = strings.TrimPrefix(version, "go")
	}
	return &spdx.Package{
		PackageName: m.Path, PackageSPDXIdentifier: elementID("module", m.Path, version), PackageVersion: version,
		PackageDownloadLocation: noneStated, PackageLicenseConcluded: noneStated, PackageLicenseDeclared: noneStated,
		PackageCopyrightText: noneStated, PrimaryPackagePurpose: "LIBRARY", PackageExternalReferences: purl(m.Path, version),
	}
}

func purl(path, version string) []*spdx.PackageExternalReference {
	return []*spdx.PackageExternalReference{{
		Category: spdx.CategoryPackageManager, RefType: spdx.PackageManagerPURL,
		Locator: "pkg:golang/" + path + "@" + strings.ReplaceAll(version, "+", "%2B"),
	}}
}

// notInID is what an identifier of SPDX may not have.
var notInID = regexp.MustCompile(`[^A-Za-z0-9.-]+`)

func elementID(parts ...string) spdx.ElementID {
	return spdx.ElementID(notInID.ReplaceAllString(strings.Join(parts, "-"), "-"))
}
