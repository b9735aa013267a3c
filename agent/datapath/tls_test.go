// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"errors"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// TestRefusedTLS: on a kernel whose version says that it refuses kTLS on a socket of
// a flow, it does, and what was redirected before and what is sent after arrives. A
// program then encrypts itself. Where the hazard is present, the guard's test has it.
func TestRefusedTLS(t *testing.T) {
	n := mustTwoPods(t, nil)
	c, s := n.connect(t)
	n.warmUp(t, c, s)
	if hazard(t, "ktls") {
		t.Log("this kernel has the hazard ktls")
		return
	}
	mustWrite(t, c, "before")
	control(t, s.(*net.TCPConn), func(fd int) error {
		if err := unix.SetsockoptString(fd, unix.SOL_TCP, unix.TCP_ULP, "tls"); err != nil {
			return err
		}
		// struct tls12_crypto_info_aes_gcm_128 (include/uapi/linux/tls.h): TLS 1.2, the
		// cipher's number, then keys that do not matter.
		const solTLS, tx, rx = 282, 1, 2
		info := make([]byte, 40)
		copy(info, []byte{3, 3, 51, 0})
		for _, way := range []int{tx, rx} {
			if err := unix.SetsockoptString(fd, solTLS, way, string(info)); !errors.Is(err, unix.EINVAL) {
				t.Errorf("option %d: got %v, want EINVAL", way, err)
			}
		}
		return nil
	})
	mustRead(t, s, "before")
	mustWrite(t, c, "after")
	mustRead(t, s, "after")
	mustWrite(t, s, "answer")
	mustRead(t, c, "answer")
	sandboxtest.MustPing(t, c, s, 5, 100)
}
