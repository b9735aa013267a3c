// SPDX-License-Identifier: Apache-2.0

// Command podshunt is the CNI plugin, chained last in a conflist. It tells the
// agent of this node which pod sandboxes come and go, and passes the result of
// the plugins before it through unchanged.
//
// It fails open: whatever state the agent is in, pods start, stop and are
// checked as without podshunt, at most the configured timeout later. Only a
// section of the conflist that it does not understand is an error. It touches
// neither network namespaces nor kernel objects.
package main

import (
	"os"

	"github.com/containernetworking/cni/pkg/skel"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/podshunt/podshunt/api"
)

// version is set by the linker.
var version = "devel"

func main() {
	skel.PluginMainFuncs(skel.CNIFuncs{
		Add:    func(args *skel.CmdArgs) error { return add(args, os.Stdout) },
		Del:    del,
		Check:  check,
		GC:     gc,
		Status: status,
	}, cniversion.VersionsStartingFrom("0.3.0"), "CNI plugin "+api.PluginType+" "+version)
}
