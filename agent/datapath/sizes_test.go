// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What is not configured follows from what is.
func TestSizes(t *testing.T) {
	sizes := func(change func(*Config)) map[string]uint32 {
		cfg := DefaultConfig()
		change(&cfg)
		return cfg.sizes()
	}
	for _, tc := range []struct {
		name string
		got  map[string]uint32
		want map[string]uint32
	}{
		{"default", sizes(func(*Config) {}), map[string]uint32{
			"pods": 1024, "charges": 2048, "shares": 2048, "policies": 131072,
			"flows": 32768, "sockets": 65536, "syns": 16384, "pending": 16384, "offers": 16384,
		}},
		{"small", sizes(func(c *Config) { c.MaxPolicies, c.MaxFlows = 100, 4 }), map[string]uint32{
			"pods": 1024, "charges": 2048, "shares": 2048, "policies": 100,
			"flows": 4, "sockets": 8, "syns": 1024, "pending": 1024, "offers": 1024,
		}},
		{"large", sizes(func(c *Config) { c.MaxPolicies, c.MaxFlows = 1<<20, 1<<20 }), map[string]uint32{
			"pods": 8192, "charges": 16384, "shares": 16384, "policies": 1 << 20,
			"flows": 1 << 20, "sockets": 2 << 20, "syns": 1 << 19, "pending": 1 << 19, "offers": 1 << 19,
		}},
		{"all", sizes(func(c *Config) { c.SetSizes(1, 8, 3) }), map[string]uint32{
			"pods": 1, "charges": 2, "shares": 2, "policies": 131072,
			"flows": 32768, "sockets": 3, "syns": 8, "pending": 8, "offers": 8,
		}},
	} {
		if diff := cmp.Diff(tc.want, tc.got); diff != "" {
			t.Errorf("%s (-want +got)\n%s", tc.name, diff)
		}
	}
}
