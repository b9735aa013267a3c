// SPDX-License-Identifier: Apache-2.0

package cluster_test

import "testing"

// TestTogether runs side by side what leaves the agents alone.
func TestTogether(t *testing.T) {
	newProof(t).mustInstall()
	t.Run("SameAddress", proveSameAddress)
	for name, prove := range map[string]func(*testing.T){
		"Plain":       provePlain,
		"Services1":   func(t *testing.T) { proveServices(t, 1) },
		"Services2":   func(t *testing.T) { proveServices(t, 2) },
		"Nodes":       proveNodes,
		"StatefulSet": proveStatefulSet,
		"Annotate":    proveAnnotate,
		"Namespace":   proveNamespace,
		"Policy":      provePolicy,
		"Events":      proveEvents,
		"Examples":    proveExamples,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			prove(t)
		})
	}
}
