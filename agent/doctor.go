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

	"github.com/podshunt/podshunt/agent/cri"
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

// hazardsHelp says what breaks where a hazard is accepted.
func hazardsHelp() string {
	var b strings.Builder
	b.WriteString(`Hazards are what a kernel does differently on the shortcut than on TCP. Some are fatal,
and keep all pods on TCP where no guard helps; another keeps sockets in blocking mode
there. --accept-hazards=NAME,... lets them take part all the same; all accepts each of
these. On a kernel that has the hazard, these programs break then:
`)
	names, consequences := hazards.Acceptable()
	for i, name := range names {
		fmt.Fprintf(&b, "  %-19s  %s\n", name, consequences[i])
	}
	return b.String()
}

func newDoctorCommand() *cobra.Command {
	f := defaults().kernelFlags
	var output, procfs string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Test this kernel, and show whether pods would take part on it",
		Long: `Tests, on connections of its own, what this kernel does differently on the shortcut
than on TCP (hazards). It needs root but no agent, and changes nothing on the node.
The exit status is 0 if pods would take part with these flags, and 4 if this kernel
keeps them on TCP.

` + hazardsHelp() + "\n" + guardsHelp,
		Example: `  podshunt-agent doctor
  podshunt-agent doctor --accept-hazards=fionread-tcp,blocking-recv --output=json`,
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
			runtime, err := cri.Find(procfs)
			if err != nil {
				runtime.Error = err.Error()
			}
			e.Runtime = &runtime.Runtime
			e = withNode(e, nodeReport(procfs, runtime.Runtime))
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
	procVar(cmd, &procfs)
	outputVar(cmd, &output)
	return cmd
}

// kernelFlags say which kernels pods may take part on, and which guards may be used.
type kernelFlags struct {
	acceptedHazards []string // by name, or all
	disabledGuards  []string
}

func (f *kernelFlags) register(cmd *cobra.Command) {
	acceptable := acceptableHazards()
	cmd.Flags().StringSliceVar(&f.acceptedHazards, "accept-hazards", nil,
		"`hazards` of the kernel that do not keep pods, or sockets in blocking mode, on TCP, so that the programs named above break, separated by commas: "+strings.Join(acceptable, ", "))
	completeWords(cmd, "accept-hazards", acceptable)
	names := datapath.GuardNames()
	cmd.Flags().StringSliceVar(&f.disabledGuards, "disable-guards", nil, "`guards` to leave out, separated by commas: "+strings.Join(names, ", "))
	completeWords(cmd, "disable-guards", names)
}

// allHazards accepts every hazard that can be accepted.
const allHazards = "all"

// acceptableHazards returns the words that --accept-hazards takes.
func acceptableHazards() []string {
	names, _ := hazards.Acceptable()
	return append(names, allHazards)
}

// accepted returns the names of the accepted hazards, in the order of the table.
func (f *kernelFlags) accepted() []string {
	names, _ := hazards.Acceptable()
	return slices.DeleteFunc(names, func(name string) bool {
		return !slices.Contains(f.acceptedHazards, name) && !slices.Contains(f.acceptedHazards, allHazards)
	})
}

func (f *kernelFlags) validate() error {
	acceptable := acceptableHazards()
	for _, name := range f.acceptedHazards {
		if !slices.Contains(acceptable, name) {
			return fmt.Errorf("--accept-hazards=%q: accepted are %s", name, strings.Join(acceptable, ", "))
		}
	}
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
		Version:  version, Kernel: kernelRelease(), AcceptedHazards: f.accepted(),
	}
	if err := datapath.CheckKernel(); err != nil {
		e.Reason, e.Message = api.KernelLacksFeatures, err.Error()
		return e
	}
	err := datapath.CheckWatch()
	e.NewConnections, e.OpenConnections = newConnections(err == nil, err), openConnections(datapath.CheckJoin())
	var guards []string
	for _, name := range datapath.GuardNames() {
		if !slices.Contains(f.disabledGuards, name) {
			guards = append(guards, name)
		}
	}
	e.Hazards = hazards.Measure(guards)
	if e.Message = refuseHazards(e.Hazards, e.AcceptedHazards); e.Message != "" {
		e.Reason = api.KernelFatalHazards
	}
	e.TakesPart = e.Reason == ""
	return e
}

// newConnections describes when new connections join; err is why they cannot be watched.
func newConnections(watched bool, err error) api.NewConnections {
	n := api.NewConnections{Watched: watched}
	if err != nil {
		n.Message = err.Error()
	}
	return n
}

// newConnectionsText is the same for people.
func newConnectionsText(n api.NewConnections) string {
	switch {
	case n.Watched:
		return "join once they have earned it"
	case n.Message != "":
		return "join at their handshake: " + n.Message
	}
	return "join at their handshake"
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

// acceptedHazards returns the accepted hazards that a kernel has and no guard makes harmless.
func acceptedHazards(hazards []api.Hazard, accepted []string) (found []api.Hazard) {
	for _, h := range hazards {
		if h.Present && h.Guard == "" && slices.Contains(accepted, h.Name) {
			found = append(found, h)
		}
	}
	return found
}

// refuseHazards returns why no pod may take part on this kernel, or "". It names the
// programs that would break, so that nobody accepts a hazard without knowing them.
func refuseHazards(hazards []api.Hazard, accepted []string) string {
	var names, consequences []string
	for _, h := range hazards {
		if h.Present && h.Fatal && !slices.Contains(accepted, h.Name) {
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
		"with --accept-hazards=%s they take part on this one, and those programs break",
		strings.Join(names, ", "), strings.Join(consequences, "; "), strings.Join(names, ","))
}

// refusal returns the error of doctor if no pod would take part.
func refusal(e api.KernelReport) error {
	verb := "would"
	if e.Reason != api.KernelFatalHazards {
		verb = "can"
	}
	return statusError{fmt.Errorf("no pod %s take part: %s", verb, e.Message), exitRefused}
}

func writeKernelReport(w io.Writer, e api.KernelReport) error {
	t := newTable(w)
	t.row("agent", e.Version)
	t.row("kernel", e.Kernel)
	if e.Runtime != nil {
		t.row("runtime", runtimeText(*e.Runtime))
	}
	writeNodeReport(t, e.Node)
	if e.Reason != api.KernelLacksFeatures {
		t.row("new connections", newConnectionsText(e.NewConnections))
		t.row("open connections", openConnectionsText(e.OpenConnections))
	}
	if e.Reason != api.KernelLacksFeatures {
		t.row()
		t.row("HAZARD", "STATE", "", "")
	}
	for _, h := range e.Hazards {
		t.row(h.Name, hazardState(h, e.AcceptedHazards), "this kernel", h.Detail)
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
