// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
)

// OpenDatapath opens a datapath without an agent. Its pins are in the sandbox, and
// unless cfg has a cgroup it sees what runs there. The caller unloads it.
func (s *Sandbox) OpenDatapath(cfg datapath.Config, log *slog.Logger) (*datapath.Datapath, error) {
	cfg.Cgroup, cfg.PinDir = cmp.Or(cfg.Cgroup, s.Cgroup), s.PinDir
	return datapath.Open(cfg, log)
}

// UnloadDatapath unloads a datapath and closes it. When ctx ends first, the error
// has the connections that were waited for.
func UnloadDatapath(ctx context.Context, d *datapath.Datapath) error {
	flows, err := d.Unload(ctx)
	if err != nil {
		err = fmt.Errorf("unload, waiting for %+v: %w", flows, err)
	}
	return errors.Join(err, d.Close())
}

// Cookie is the number by which a datapath knows the pod.
func (n *Netns) Cookie() (uint64, error) { return datapath.NetnsCookie(n.Path) }

// Between returns a rule over all ports for every ordered pair of pods, by their cookies.
func Between(verdict rule.Verdict, cookies ...uint64) (rules []rule.Rule) {
	for _, client := range cookies {
		for _, server := range cookies {
			rules = append(rules, rule.Rule{Client: client, Server: server, Last: 65535, Verdict: verdict})
		}
	}
	return rules
}
