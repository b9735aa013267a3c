// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// BenchmarkGuards has what the guards cost: calls that any program of the node
// makes, and messages by the shortcut, without guards and with all of them. Where
// QEMU emulates the CPU, only the proportion of the two says something.
func BenchmarkGuards(b *testing.B) {
	sets := [][]string{nil}
	if hazard(b, "no-trampolines") {
		b.Log("this kernel refuses guards: there is nothing to compare with")
	} else {
		sets = append(sets, datapath.GuardNames())
	}
	for _, guards := range sets {
		n := mustNode(b, func(c *datapath.Config) { c.Guards = guards })
		pods, cookies := n.MustEnrol(b, "client", "server")
		n.MustSetPolicy(b, sandbox.Between(rule.Allow, cookies...))
		l, address := mustListenOn(b, pods[1])
		c, s := connect(b, pods[0].Netns, l, "tcp4", address)
		n.warmUp(b, c, s)
		run := func(name string, f func() error) {
			b.Run(fmt.Sprintf("%s/guards=%d", name, len(guards)), func(b *testing.B) {
				for b.Loop() {
					if err := f(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		file, err := os.Create(filepath.Join(b.TempDir(), "file"))
		if err != nil {
			b.Fatal(err)
		}
		defer file.Close()
		message := make([]byte, 64)
		if _, err := file.Write(message); err != nil {
			b.Fatal(err)
		}
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			b.Fatal(err)
		}
		defer unix.Close(pair[0])
		defer unix.Close(pair[1])
		run("read of a file", func() error {
			_, err := unix.Pread(int(file.Fd()), message, 0)
			return err
		})
		run("write and read of a Unix socket", func() error {
			if _, err := unix.Write(pair[0], message); err != nil {
				return err
			}
			_, err := unix.Read(pair[1], message)
			return err
		})
		run("setsockopt", func() error {
			return unix.SetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PASSCRED, 0)
		})
		run("shortcut there and back", func() error { return roundTrip(c, s, message) })
	}
}

func roundTrip(a, b net.Conn, message []byte) error {
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		if _, err := way[0].Write(message); err != nil {
			return err
		}
		if _, err := io.ReadFull(way[1], message); err != nil {
			return err
		}
	}
	return nil
}
