// SPDX-License-Identifier: Apache-2.0

// Package apps_test runs real programs between pods: first on plain TCP, then
// with the shortcut. Their answers have to be the same, and the agent's counters
// say which way the bytes took.
package apps_test

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"testing"

	"github.com/podshunt/podshunt/e2e/apps/overlay"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// The account that programs run as.
const (
	accountName = overlay.AccountName
	accountID   = overlay.AccountID
)

func TestMain(m *testing.M) {
	flag.Parse()
	if *list {
		printPrograms()
		os.Exit(0)
	}
	os.Exit(sandbox.Main(func() int {
		leave, err := prepare()
		if err != nil {
			fmt.Fprintln(os.Stderr, "apps:", err)
			return 1
		}
		status := m.Run()
		if err := leave(); err != nil {
			fmt.Fprintln(os.Stderr, "apps:", err)
			return 1
		}
		return status
	}))
}

// prepare makes the unpacked programs and the account known to all processes of
// this run.
func prepare() (leave func() error, err error) {
	if os.Geteuid() != 0 {
		return func() error { return nil }, nil
	}
	return overlay.Enter(cmp.Or(os.Getenv("PODSHUNT_APPS"), "../../.cache/apps"))
}
