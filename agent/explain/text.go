// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"cmp"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// messageTexts says to people why a message went by TCP, by the code of its outcome.
var messageTexts = map[string]string{
	"unknown_socket":   "the connection is closing",
	"switched_off":     "podshunt is unloading",
	"peer_missing":     "the server's socket has not joined",
	"peer_gone":        "the other socket is closed",
	"evicted":          "a socket in blocking mode has been evicted from the shortcut",
	"stale":            "the agent has not been able to vouch for the policy for longer than --policy-lease",
	"not_allowed":      "not allowed",
	"shut_down":        "the sender has shut down writing",
	"ulp":              "kTLS or another upper layer protocol is in use",
	"zerocopy":         "the sender has set SO_ZEROCOPY",
	"lowat":            "the receiver has set SO_RCVLOWAT",
	"not_seen":         "the receiver has not been seen to read yet",
	"unsupported":      "a call was used that the shortcut does not serve",
	"trial":            "the receiver has yet to show by TCP that it reads such messages by recv",
	"edge":             "the receiver waits for edges of epoll, and has yet to show that it reads until nothing is left",
	"refresh":          "one message now and then keeps the connection known to the network",
	"draining":         "the receiver has TCP bytes to read first",
	"unobserved":       "the receiver is inside a read, or reads by splice or another call that is not seen",
	"budget":           "the receiver has left too much unread",
	"receive_buffer":   "the receiver's buffer is small, and TCP needs what is left of it",
	"pod_budget":       "the connections of the receiver's pod have left too much unread",
	"memory":           "the node's TCP uses more memory than the first value of net.ipv4.tcp_mem",
	"redirect_refused": "the other socket is closing",
}

func messageText(code string) string { return cmp.Or(messageTexts[code], code) }

// callNames are what a program calls what the shortcut does not serve, by code.
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
}

// Calls names to people what the shortcut does not serve.
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
