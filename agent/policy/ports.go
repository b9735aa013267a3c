// SPDX-License-Identifier: Apache-2.0

// Sets of ports.

package policy

import (
	"cmp"
	"math/bits"
	"slices"

	"github.com/podshunt/podshunt/api"
)

// portSet is a set of TCP ports: sorted ranges that neither overlap nor touch. It is
// immutable. Port 0 is never in it: nobody listens there.
type portSet []api.PortRange

// newPortSet sorts and merges ranges in place, and returns them as a set.
func newPortSet(ranges []api.PortRange) portSet {
	slices.SortFunc(ranges, func(a, b api.PortRange) int { return cmp.Compare(a.First, b.First) })
	set := ranges[:0]
	for _, r := range ranges {
		if n := len(set); n > 0 && int(r.First) <= int(set[n-1].Last)+1 {
			set[n-1].Last = max(set[n-1].Last, r.Last)
		} else {
			set = append(set, r)
		}
	}
	return set
}

func allPorts() portSet { return portSet{{First: 1, Last: 65535}} }

func (s portSet) isAll() bool { return len(s) == 1 && s[0].First == 1 && s[0].Last == 65535 }

func (s portSet) contains(port uint16) bool {
	return slices.ContainsFunc(s, func(r api.PortRange) bool { return r.First <= port && port <= r.Last })
}

func (s portSet) intersect(other portSet) portSet {
	switch {
	case other.isAll():
		return s
	case s.isAll():
		return other
	}
	var both portSet
	for len(s) > 0 && len(other) > 0 {
		if first, last := max(s[0].First, other[0].First), min(s[0].Last, other[0].Last); first <= last {
			both = append(both, api.PortRange{First: first, Last: last})
		}
		if s[0].Last < other[0].Last {
			s = s[1:]
		} else {
			other = other[1:]
		}
	}
	return both
}

// entries returns how many entries of the policy map, which are prefixes, the ranges
// take.
func (s portSet) entries() int {
	n := 0
	for _, r := range s {
		for next, end := uint32(r.First), uint32(r.Last)+1; next < end; n++ {
			size := min(16, bits.TrailingZeros32(next|1<<16))
			for next+1<<size > end {
				size--
			}
			next += 1 << size
		}
	}
	return n
}

func (s portSet) complement() portSet {
	var rest portSet
	next := 1
	for _, r := range s {
		if next < int(r.First) {
			rest = append(rest, api.PortRange{First: uint16(next), Last: r.First - 1})
		}
		next = int(r.Last) + 1
	}
	if next <= 65535 {
		rest = append(rest, api.PortRange{First: uint16(next), Last: 65535})
	}
	return rest
}
