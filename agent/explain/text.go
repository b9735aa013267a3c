// SPDX-License-Identifier: Apache-2.0

// The words for people beside each code.

package explain

import (
	"cmp"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// messageTexts has, by the code of its outcome, why a message went by TCP.
var messageTexts = map[string]string{
	"unknown_socket":   "the connection is closing",
	"switched_off":     "podshunt is unloading",
	"untraced":         "the kernel does not run the guards, as kernel.ftrace_enabled is 0",
	"peer_missing":     "the server's socket has not joined",
	"peer_gone":        "the other socket is closed",
	"evicted":          "a socket in blocking mode has been evicted from the shortcut",
	"no_gain":          "the shortcut is no faster for what this connection sends",
	"stale":            "for longer than --policy-lease no agent has confirmed that the policy is up to date",
	"not_allowed":      "not allowed",
	"shut_down":        "the sender has shut down writing",
	"ulp":              "kTLS or another upper layer protocol is in use",
	"zerocopy":         "the sender has set SO_ZEROCOPY",
	"lowat":            "the receiver has set SO_RCVLOWAT",
	"not_seen":         "the receiver has not been seen to read yet",
	"unsupported":      "one end used a call that does not work on the shortcut",
	"trial":            "the receiver has yet to show, on TCP, that it reads such messages with recv",
	"edge":             "the receiver uses edge-triggered epoll, and has yet to show that it reads until nothing is left",
	"compared":         "some messages of a stream go by TCP now and then, to see which way is faster",
	"refresh":          "one message now and then goes by TCP, so that the network does not forget the connection",
	"piggyback":        "it carries the acknowledgement of what the other end sends by TCP, and would wait for (Nagle's algorithm)",
	"draining":         "the receiver has TCP bytes to read first",
	"unobserved":       "the receiver is in the middle of a read, or reads by splice or another call that podshunt does not see",
	"budget":           "the receiver has left too much unread",
	"receive_buffer":   "the receive buffer has no room left beside what TCP may need",
	"pod_budget":       "the connections of the receiver's pod have left too much unread",
	"memory":           "the node's TCP uses more memory than the first value of net.ipv4.tcp_mem",
	"redirect_refused": "the other socket is closing",
}

func messageText(code string) string { return cmp.Or(messageTexts[code], code) }

// callNames has the names of unsupported calls and options, by code.
var callNames = map[string]string{
	"msg_waitall":    "MSG_WAITALL",
	"msg_oob":        "MSG_OOB",
	"recv_flags":     "other flags of recv",
	"so_rcvlowat":    "SO_RCVLOWAT",
	"fionread":       "FIONREAD",
	"splice":         "splice",
	"tcp_ulp":        "TCP_ULP",
	"so_zerocopy":    "SO_ZEROCOPY",
	"mptcp_listener": "MPTCP listener",
	"blocking":       "a socket in blocking mode",
	"tcp_options":    "TCP options of another BPF program",
}

// Calls returns the names of unsupported calls and options, given their codes.
func Calls(codes []string) string {
	var names []string
	for _, code := range codes {
		names = append(names, cmp.Or(callNames[code], code))
	}
	return strings.Join(names, ", ")
}

// flagNames returns the names of recv flags.
func flagNames(flags uint32) string {
	var names []string
	for _, f := range []struct {
		bit  uint32
		name string
	}{
		{unix.MSG_OOB, "MSG_OOB"},
		{unix.MSG_PEEK, "MSG_PEEK"},
		{unix.MSG_TRUNC, "MSG_TRUNC"},
		{unix.MSG_WAITALL, "MSG_WAITALL"},
		{unix.MSG_ERRQUEUE, "MSG_ERRQUEUE"},
		{unix.MSG_ZEROCOPY, "MSG_ZEROCOPY"},
	} {
		if flags&f.bit != 0 {
			names = append(names, f.name)
			flags &^= f.bit
		}
	}
	if flags != 0 {
		names = append(names, fmt.Sprintf("%#x", flags))
	}
	return strings.Join(names, " ")
}
