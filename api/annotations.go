// SPDX-License-Identifier: Apache-2.0

// The annotations by which users opt in and out.

package api

import (
	"errors"
	"fmt"
	"sort"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// AnnotationPrefix starts every annotation of podshunt.
const AnnotationPrefix = "podshunt.io/"

// The annotations, on a pod.
const (
	// AnnotationShortcut opts a pod in ("enabled") or out ("disabled").
	AnnotationShortcut = AnnotationPrefix + "shortcut"
	// AnnotationPorts limits which of the pod's own server ports may be
	// shortcut: ports and ranges, "6379,8000-8010". Without it, all may.
	AnnotationPorts = AnnotationPrefix + "ports"
	// AnnotationExcludePorts keeps server ports on TCP, in the same form. It
	// wins over AnnotationPorts.
	AnnotationExcludePorts = AnnotationPrefix + "exclude-ports"
	// AnnotationPausedUntil keeps the pod's connections on TCP until a time in
	// RFC 3339 form.
	AnnotationPausedUntil = AnnotationPrefix + "paused-until"
	// AnnotationBlockingSockets lets connections take part whose sockets are in blocking
	// mode ("accept"), if the pods at both ends have it, or keeps them on TCP ("refuse").
	// A recv that blocks may then return EAGAIN, so it is for programs that retry.
	AnnotationBlockingSockets = AnnotationPrefix + "blocking-sockets"
)

// MaxPortRanges limits the ports and ranges that an annotation may list. Each takes
// entries, for each client, of a map that all pods of the node share.
const MaxPortRanges = 64

// PortRange is a range of TCP ports, both ends included: 1 <= First <= Last.
type PortRange struct {
	First, Last uint16
}

// String returns the form that an annotation takes.
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// Settings holds what the annotations of a pod ask for. The zero value is not opted
// in.
type Settings struct {
	Enabled bool
	// Ports are the server ports that may be shortcut; empty means all.
	Ports []PortRange
	// ExcludePorts are server ports that stay on TCP; they win over Ports.
	ExcludePorts []PortRange
	// PausedUntil keeps the pod's connections on TCP until then.
	PausedUntil time.Time
	// AcceptBlocking lets sockets in blocking mode take part, if both pods ask for it.
	AcceptBlocking bool
}

// ParseAnnotations reads the annotations of podshunt among those of a pod;
// others are ignored. It is strict: an unknown name under AnnotationPrefix or a
// value that is not accepted is an error that lists what is. Faults are
// reported together, and the Settings are zero then, so that a pod whose
// intents are unclear stays on TCP.
func ParseAnnotations(annotations map[string]string) (Settings, error) {
	var (
		s    Settings
		errs []error
		err  error
	)
	names := make([]string, 0, len(annotations))
	for name := range annotations {
		if strings.HasPrefix(name, AnnotationPrefix) {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	for _, name := range names {
		value := annotations[name]
		switch name {
		case AnnotationShortcut:
			switch value {
			case "enabled":
				s.Enabled = true
			case "disabled":
			default:
				err = errors.New(`accepted are "enabled" and "disabled"`)
			}
		case AnnotationPorts:
			s.Ports, err = parsePorts(value)
		case AnnotationExcludePorts:
			s.ExcludePorts, err = parsePorts(value)
		case AnnotationPausedUntil:
			s.PausedUntil, err = time.Parse(time.RFC3339, value)
			if err != nil {
				err = errors.New(`accepted is a time in RFC 3339 form such as "2026-01-31T18:00:00Z"`)
			}
		case AnnotationBlockingSockets:
			switch value {
			case "accept":
				s.AcceptBlocking = true
			case "refuse":
			default:
				err = errors.New(`accepted are "accept" and "refuse"`)
			}
		default:
			err = fmt.Errorf("unknown annotation; accepted are %s",
				strings.Join([]string{AnnotationShortcut, AnnotationPorts, AnnotationExcludePorts, AnnotationPausedUntil, AnnotationBlockingSockets}, ", "))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("annotation %s=%q: %w", name, Shorten(value, mostOfValue), err))
			err = nil
		}
	}
	if more := len(errs) - maxFaults; more > 0 {
		errs = append(errs[:maxFaults], fmt.Errorf("and %d more annotations that are not accepted", more))
	}
	if len(errs) > 0 {
		return Settings{}, errors.Join(errs...)
	}
	return s, nil
}

// maxFaults bounds the faults that are reported.
const maxFaults = 8

// mostOfValue bounds the bytes of a value that an error repeats.
const mostOfValue = 200

// Shorten cuts a text of a user's, which may be of any length, to at most so many
// bytes for a log, an Event or a table, and says so with "...". It cuts between
// characters; a text that is not UTF-8 may have none, e.g. "\x80\x80\x80\x80".
func Shorten(text string, most int) string {
	if len(text) <= most {
		return text
	}
	for end := most; end >= 0 && end > most-utf8.UTFMax; end-- {
		if utf8.RuneStart(text[end]) {
			return text[:end] + "..."
		}
	}
	return text[:most] + "..."
}

// parsePorts reads a list such as "6379, 8000-8010".
func parsePorts(list string) ([]PortRange, error) {
	if n := strings.Count(list, ",") + 1; n > MaxPortRanges {
		return nil, fmt.Errorf(`%d ports and ranges: accepted are at most %d; join neighbours to ranges such as "8000-8010"`, n, MaxPortRanges)
	}
	var ranges []PortRange
	for item := range strings.SplitSeq(list, ",") {
		item = strings.TrimSpace(item)
		first, last, isRange := strings.Cut(item, "-")
		if !isRange {
			last = first
		}
		lo, err1 := parsePort(first)
		hi, err2 := parsePort(last)
		if err1 != nil || err2 != nil || lo > hi {
			return nil, fmt.Errorf(`%q is not a port or a range: accepted are ports from 1 to 65535 and ranges, separated by commas, such as "6379,8000-8010"`, Shorten(item, mostOfValue))
		}
		ranges = append(ranges, PortRange{First: lo, Last: hi})
	}
	return ranges, nil
}

// parsePort accepts plain decimal digits only, so that "+80" and "080" stay errors.
func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != s {
		return 0, errors.New("not a port")
	}
	return uint16(n), nil
}
