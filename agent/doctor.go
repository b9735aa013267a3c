// SPDX-License-Identifier: Apache-2.0

// The command doctor, and the flags by which run and doctor judge a kernel.

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/hazards"
	"github.com/podshunt/podshunt/api"
)

// guardsHelp explains guards in the help of commands that have kernelFlags.
const guardsHelp = `Guards are kernel programs that see a call which does not work on the shortcut
before the kernel serves it. A guard is used if this kernel has its hazard and
can run it. --disable-guards leaves some out:
  fionread  a connection whose reader calls FIONREAD stays on TCP
  flags     a connection that uses MSG_WAITALL or MSG_OOB stays on TCP
  splice    splice fails with EINVAL, so that programs read and write instead;
            this guard runs for every read and write of a file on the node
  ulp       TCP_ULP (kTLS) fails with ENOENT, so that programs encrypt themselves`

func newDoctorCommand() *cobra.Command {
	f := defaults().kernelFlags
	var output string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Test this kernel, and show whether pods would take part on it",
		Long: `Tests, on connections of its own, what this kernel does differently on the shortcut
than on TCP (hazards). It needs root but no agent, and changes nothing on the node.
The exit status is 0 if pods would take part with these flags, and 4 if this kernel
keeps them on TCP.

` + guardsHelp,
		Example: `  podshunt-agent doctor
  podshunt-agent doctor --kernel-hazards=accept --output=json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.validate(); err != nil {
				return usageError(err)
			}
			// To other users, every kernel looks as if it lacked
			// everything.
			if os.Geteuid() != 0 {
				return errors.New("doctor loads programs into the kernel to try it: run it as root")
			}
			e := f.kernelReport()
			write := writeKernelReport
			if output == "json" {
				write = func(w io.Writer, e api.KernelReport) error { return writeJSON(w, e) }
			}
			if err := write(cmd.OutOrStdout(), e); err != nil {
				return err
			}
			if !e.TakesPart {
				return refusal(e)
			}
			return nil
		},
	}
	f.register(cmd)
	outputVar(cmd, &output)
	return cmd
}

// kernelFlags say which kernels pods may take part on, and which guards may be used.
type kernelFlags struct {
	hazards        string // refuse or accept
	disabledGuards []string
}

func (f *kernelFlags) register(cmd *cobra.Command) {
	choiceVar(cmd, &f.hazards, "kernel-hazards", "",
		"`action` on kernels where programs break on the shortcut: refuse keeps all pods on TCP; accept lets them take part, and the programs that \"podshunt-agent doctor\" names break",
		"refuse", "accept")
	names := datapath.GuardNames()
	cmd.Flags().StringSliceVar(&f.disabledGuards, "disable-guards", nil, "`guards` to leave out, separated by commas: "+strings.Join(names, ", "))
	completeWords(cmd, "disable-guards", names)
}

func (f *kernelFlags) validate() error {
	names := datapath.GuardNames()
	for _, name := range f.disabledGuards {
		if !slices.Contains(names, name) {
			return fmt.Errorf("--disable-guards=%q: accepted are %s", name, strings.Join(names, ", "))
		}
	}
	return nil
}

// kernelReport measures this kernel. It changes nothing on the node.
func (f *kernelFlags) kernelReport() api.KernelReport {
	e := api.KernelReport{
		TypeMeta: api.TypeMeta{APIVersion: api.Version, Kind: api.KindKernelReport},
		Version:  version, Kernel: kernelRelease(), HazardsAccepted: f.hazards == "accept",
	}
	if err := datapath.CheckKernel(); err != nil {
		e.Reason, e.Message = api.KernelLacksFeatures, err.Error()
		return e
	}
	e.OpenConnections = openConnections(datapath.CheckJoin())
	var guards []string
	for _, name := range datapath.GuardNames() {
		if !slices.Contains(f.disabledGuards, name) {
			guards = append(guards, name)
		}
	}
	e.Hazards = hazards.Measure(guards)
	if !e.HazardsAccepted {
		if e.Message = refuseHazards(e.Hazards); e.Message != "" {
			e.Reason = api.KernelFatalHazards
		}
	}
	e.TakesPart = e.Reason == ""
	return e
}

// openConnections describes what becomes of open connections if err is why they cannot join.
func openConnections(err error) api.OpenConnections {
	if err != nil {
		return api.OpenConnections{Message: err.Error()}
	}
	return api.OpenConnections{Join: true}
}

// openConnectionsText is the same for people.
func openConnectionsText(o api.OpenConnections) string {
	if o.Join {
		return "join"
	}
	return "stay on TCP until they are made anew: " + o.Message
}

func kernelRelease() string {
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return "" // it cannot fail with a valid address
	}
	return unix.ByteSliceToString(uname.Release[:])
}

// present reports whether a hazard was found.
func present(hazards []api.Hazard, name string) bool {
	return slices.ContainsFunc(hazards, func(h api.Hazard) bool { return h.Name == name && h.Present })
}

// guardsIn returns the guards that this kernel needs and that work on it.
func guardsIn(hazards []api.Hazard) []string {
	var guards []string
	for _, h := range hazards {
		if h.Guard != "" && !slices.Contains(guards, h.Guard) {
			guards = append(guards, h.Guard)
		}
	}
	return guards
}

// refuseHazards returns why no pod may take part on this kernel, or "". It names the
// programs that would break, so that nobody accepts a hazard without knowing them.
func refuseHazards(hazards []api.Hazard) string {
	var names, consequences []string
	for _, h := range hazards {
		if h.Present && h.Fatal {
			names = append(names, h.Name)
			if !slices.Contains(consequences, h.Consequence) {
				consequences = append(consequences, h.Consequence)
			}
		}
	}
	if len(names) == 0 {
		return ""
	}
	return fmt.Sprintf("kernel hazards %s: %s. Pods take part on a kernel without them (`podshunt-agent doctor` has the details); "+
		"with --kernel-hazards=accept they take part on this one, and those programs break",
		strings.Join(names, ", "), strings.Join(consequences, "; "))
}

// refusal returns the error of doctor if no pod would take part.
func refusal(e api.KernelReport) error {
	verb := "would"
	if e.Reason == api.KernelLacksFeatures {
		verb = "can"
	}
	return statusError{fmt.Errorf("no pod %s take part: %s", verb, e.Message), exitRefused}
}

func writeKernelReport(w io.Writer, e api.KernelReport) error {
	t := newTable(w)
	t.row("agent", e.Version)
	t.row("kernel", e.Kernel)
	if e.Reason != api.KernelLacksFeatures {
		t.row("open connections", openConnectionsText(e.OpenConnections))
	}
	if e.Reason != api.KernelLacksFeatures {
		t.row()
		t.row("HAZARD", "STATE", "", "")
	}
	for _, h := range e.Hazards {
		t.row(h.Name, hazardState(h, e.HazardsAccepted), "this kernel", h.Detail)
		if h.Present {
			t.row("", "", "consequence", h.Consequence)
			t.row("", "", "podshunt", h.Action)
		}
	}
	if e.TakesPart {
		t.row()
		t.row("pods take part on this kernel")
	}
	return t.flush()
}
