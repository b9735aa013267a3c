// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/api"
)

// judgement is the flags that say what a kernel must be like.
type judgement struct {
	hazards string            // refuse or accept
	guards  map[string]string // on or off, by name
}

func newJudgement() judgement {
	j := judgement{hazards: "refuse", guards: map[string]string{}}
	for _, name := range datapath.GuardNames() {
		j.guards[name] = "on"
	}
	return j
}

func (j *judgement) register(flags *flag.FlagSet) {
	flags.StringVar(&j.hazards, "kernel-hazards", j.hazards,
		"refuse or accept a kernel that serves shortcut sockets differently from TCP; with accept the programs break that \"podshunt-agent doctor\" names")
	for name, does := range map[string]string{
		datapath.GuardSplice:   "splice from a shortcut socket fails with EINVAL; every read and write of a file on the node passes it",
		datapath.GuardULP:      "TCP_ULP (kTLS) on a shortcut socket fails with ENOENT",
		datapath.GuardFIONREAD: "a socket that uses FIONREAD stays on TCP, where the kernel does not count redirected bytes",
		datapath.GuardFlags:    "MSG_WAITALL and MSG_OOB are seen before they are served",
	} {
		flags.Func(name+"-guard", "on or off (default on): "+does+"; needs a kernel that allows trampolines", func(value string) error {
			if value != "on" && value != "off" {
				return errors.New("accepted are on, off")
			}
			j.guards[name] = value
			return nil
		})
	}
}

func (j *judgement) validate() error {
	if j.hazards != "refuse" && j.hazards != "accept" {
		return fmt.Errorf("--kernel-hazards=%q: accepted are refuse, accept", j.hazards)
	}
	return nil
}

// examine measures this kernel. Nothing of the node is touched.
func (j *judgement) examine() api.Examination {
	e := api.Examination{Version: version, Kernel: kernelRelease(), HazardsAccepted: j.hazards == "accept"}
	if err := datapath.CheckKernel(); err != nil {
		e.Missing = err.Error()
		return e
	}
	var guards []string
	for _, name := range datapath.GuardNames() {
		if j.guards[name] == "on" {
			guards = append(guards, name)
		}
	}
	e.Hazards = datapath.Hazards(guards)
	if !e.HazardsAccepted {
		e.Refusal = refuseHazards(e.Hazards)
	}
	e.TakesPart = e.Refusal == ""
	return e
}

func kernelRelease() string {
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return "" // it cannot fail with a valid address
	}
	return unix.ByteSliceToString(uname.Release[:])
}

// present tells whether a hazard was found.
func present(hazards []api.Hazard, name string) bool {
	return slices.ContainsFunc(hazards, func(h api.Hazard) bool { return h.Name == name && h.Present })
}

// guardsIn returns the guards that work and that this kernel needs.
func guardsIn(hazards []api.Hazard) []string {
	var guards []string
	for _, h := range hazards {
		if h.Guard != "" && !slices.Contains(guards, h.Guard) {
			guards = append(guards, h.Guard)
		}
	}
	return guards
}

// refuseHazards returns why no pod may take part on this kernel, or "". It says who
// would notice, so that nobody accepts a hazard without knowing that.
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

func doctorCommand(args []string, stdout, stderr io.Writer) error {
	flags := newFlags("doctor", stderr)
	j := newJudgement()
	j.register(flags)
	output := flags.String("o", "text", "output: text or json")
	defaultUsage := flags.Usage
	flags.Usage = func() {
		fmt.Fprintln(stderr, `Measures on connections of its own how this kernel serves shortcut sockets. It
needs root but no agent, and changes nothing on the node. It ends with 0 if pods
would take part with these flags, else with 1.`)
		defaultUsage()
	}
	if err := parse(flags, args); err != nil {
		return err
	}
	if *output != "text" && *output != "json" {
		return fmt.Errorf("-o %q: accepted are text, json", *output)
	}
	if err := j.validate(); err != nil {
		return err
	}
	e := j.examine()
	var err error
	if *output == "json" {
		encoder := json.NewEncoder(stdout)
		encoder.SetIndent("", "  ")
		err = encoder.Encode(e)
	} else {
		err = writeExamination(stdout, e)
	}
	if err == nil && !e.TakesPart {
		err = errors.New(noPart(e))
	}
	return err
}

// noPart says why no pod would take part.
func noPart(e api.Examination) string {
	if e.Missing != "" {
		return "no pod can take part: " + e.Missing
	}
	return "no pod would take part: " + e.Refusal
}

func writeExamination(w io.Writer, e api.Examination) error {
	t := newTable(w)
	t.row("agent", e.Version)
	t.row("kernel", e.Kernel)
	if e.Missing == "" {
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
	return t.Flush()
}
