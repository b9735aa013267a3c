// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"errors"
	"testing"
	"time"

	"github.com/podshunt/podshunt/agent/policy"
)

// TestRedirects: rules that a pod's network namespace gets after its start are seen,
// looked for less and less often, and change the policy.
func TestRedirects(t *testing.T) {
	looks, redirects := map[string]int{}, map[string]bool{}
	var fault error
	f := newFixture(t, func(cfg *Config, _ *fakeKernel) {
		cfg.Redirects = func(path string) (bool, error) {
			looks[path]++
			return redirects[path] || fault != nil, fault
		}
	})
	write(t, f.podsFile, podsYAML("api shortcut=enabled", "web shortcut=enabled ports=80", "out"))
	web := f.attachment(t, "web", 11)
	f.mustPut(t, f.attachment(t, "api", 10))
	f.mustPut(t, f.attachment(t, "out", 12))
	f.mustPut(t, web)
	allowed := func() bool {
		for _, r := range f.kernel.rules {
			if r.Client == 10 && r.Server == 11 {
				return true
			}
		}
		return false
	}
	wantDiff(t, "allowed", true, allowed())
	wantDiff(t, "looks", map[string]int{f.netns(t, 10): 1, web.Netns: 1}, looks)

	poll := func(d time.Duration) {
		for end := f.now.Add(d); f.now.Before(end); {
			f.now = f.now.Add(lookInterval / 2)
			f.Sync()
		}
	}
	redirects[web.Netns] = true
	poll(lookInterval)
	wantDiff(t, "allowed with a redirect", false, allowed())
	for _, p := range f.Snapshot().Pods {
		if p.Pod.Name == "web" {
			d := policy.Explain(f.Snapshot().Pods[0].Policy, p.Policy, 80, policy.Cluster{}, f.now)
			wantDiff(t, "reason", policy.PortRedirected, d.Reason)
		}
	}
	redirects[web.Netns] = false
	poll(2 * time.Minute)
	wantDiff(t, "allowed without one", true, allowed())
	clear(looks)
	poll(10 * time.Minute)
	wantDiff(t, "looks in ten minutes", map[string]int{f.netns(t, 10): 10, web.Netns: 10}, looks)

	fault = errors.New("no netlink")
	poll(time.Minute)
	wantDiff(t, "allowed if that is not known", false, allowed())
}
