// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"math/rand/v2"
	"testing"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/bpf"
)

// TestPrefixes: the prefixes of a range follow one another from its first port
// to its last.
func TestPrefixes(t *testing.T) {
	type portRange struct{ first, last uint16 }
	const most = 30
	ranges := []portRange{{0, 65535}, {0, 0}, {65535, 65535}, {1, 65535}, {0, 65534}, {1, 65534}, {8000, 8010}}
	random := rand.New(rand.NewPCG(1, 2))
	for range 5000 {
		a, b := uint16(random.Uint32()), uint16(random.Uint32())
		ranges = append(ranges, portRange{min(a, b), max(a, b)})
	}
	longest := 0
	for _, r := range ranges {
		next, n := uint32(r.first), 0
		for port, length := range prefixes(r.first, r.last) {
			if length < 0 || length > 16 {
				t.Fatalf("%v: got a prefix of %d bits", r, length)
			}
			size := uint32(1) << (16 - length)
			if uint32(port) != next || next%size != 0 {
				t.Fatalf("%v: got prefix %d/%d, want one that starts at %d", r, port, length, next)
			}
			next += size
			n++
		}
		if want := uint32(r.last) + 1; next != want {
			t.Errorf("%v: prefixes end before %d, want %d", r, next, want)
		}
		longest = max(longest, n)
	}
	if longest != most { // 1 to 65534 takes that many
		t.Errorf("got up to %d prefixes, want %d", longest, most)
	}
}

// TestOutcomes: every outcome has a code of its own among those of its kind.
func TestOutcomes(t *testing.T) {
	seen := map[string]bool{}
	for outcome, o := range outcomes() {
		name := o.kind + "_" + o.code
		if o.code == "" || seen[name] {
			t.Errorf("outcome %d: got %q, want a code of its own", outcome, name)
		}
		seen[name] = true
		if isMessage := outcome < int(bpf.ShortcutOutcomeOUTCOME_PAIRED); isMessage != (o.kind == api.OutcomeMessage) {
			t.Errorf("outcome %d: got kind %q", outcome, o.kind)
		}
	}
}
