// SPDX-License-Identifier: Apache-2.0

// The code of each outcome that the programs count.

package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/bpf"
)

// outcomes returns the kind and the code of every outcome of bpf/outcome.h.
func outcomes() [bpf.ShortcutOutcomeOUTCOME_MAX]struct{ kind, code string } {
	return [bpf.ShortcutOutcomeOUTCOME_MAX]struct{ kind, code string }{
		bpf.ShortcutOutcomeOUTCOME_SHORTCUT:         {api.OutcomeMessage, "shortcut"},
		bpf.ShortcutOutcomeOUTCOME_UNKNOWN_SOCKET:   {api.OutcomeMessage, "unknown_socket"},
		bpf.ShortcutOutcomeOUTCOME_SWITCHED_OFF:     {api.OutcomeMessage, "switched_off"},
		bpf.ShortcutOutcomeOUTCOME_UNTRACED:         {api.OutcomeMessage, "untraced"},
		bpf.ShortcutOutcomeOUTCOME_PEER_MISSING:     {api.OutcomeMessage, "peer_missing"},
		bpf.ShortcutOutcomeOUTCOME_PEER_GONE:        {api.OutcomeMessage, "peer_gone"},
		bpf.ShortcutOutcomeOUTCOME_EVICTED:          {api.OutcomeMessage, "evicted"},
		bpf.ShortcutOutcomeOUTCOME_NO_GAIN:          {api.OutcomeMessage, "no_gain"},
		bpf.ShortcutOutcomeOUTCOME_STALE:            {api.OutcomeMessage, "stale"},
		bpf.ShortcutOutcomeOUTCOME_NOT_ALLOWED:      {api.OutcomeMessage, "not_allowed"},
		bpf.ShortcutOutcomeOUTCOME_SHUT_DOWN:        {api.OutcomeMessage, "shut_down"},
		bpf.ShortcutOutcomeOUTCOME_ULP:              {api.OutcomeMessage, "ulp"},
		bpf.ShortcutOutcomeOUTCOME_ZEROCOPY:         {api.OutcomeMessage, "zerocopy"},
		bpf.ShortcutOutcomeOUTCOME_LOWAT:            {api.OutcomeMessage, "lowat"},
		bpf.ShortcutOutcomeOUTCOME_NOT_SEEN:         {api.OutcomeMessage, "not_seen"},
		bpf.ShortcutOutcomeOUTCOME_UNSUPPORTED:      {api.OutcomeMessage, "unsupported"},
		bpf.ShortcutOutcomeOUTCOME_TRIAL:            {api.OutcomeMessage, "trial"},
		bpf.ShortcutOutcomeOUTCOME_EDGE:             {api.OutcomeMessage, "edge"},
		bpf.ShortcutOutcomeOUTCOME_COMPARED:         {api.OutcomeMessage, "compared"},
		bpf.ShortcutOutcomeOUTCOME_PIGGYBACK:        {api.OutcomeMessage, "piggyback"},
		bpf.ShortcutOutcomeOUTCOME_REFRESH:          {api.OutcomeMessage, "refresh"},
		bpf.ShortcutOutcomeOUTCOME_DRAINING:         {api.OutcomeMessage, "draining"},
		bpf.ShortcutOutcomeOUTCOME_UNOBSERVED:       {api.OutcomeMessage, "unobserved"},
		bpf.ShortcutOutcomeOUTCOME_BUDGET:           {api.OutcomeMessage, "budget"},
		bpf.ShortcutOutcomeOUTCOME_RECEIVE_BUFFER:   {api.OutcomeMessage, "receive_buffer"},
		bpf.ShortcutOutcomeOUTCOME_POD_BUDGET:       {api.OutcomeMessage, "pod_budget"},
		bpf.ShortcutOutcomeOUTCOME_MEMORY:           {api.OutcomeMessage, "memory"},
		bpf.ShortcutOutcomeOUTCOME_REDIRECT_REFUSED: {api.OutcomeMessage, "redirect_refused"},
		bpf.ShortcutOutcomeOUTCOME_PAIRED:           {api.OutcomeConnection, "paired"},
		bpf.ShortcutOutcomeOUTCOME_POLICY_REFUSED:   {api.OutcomeConnection, "policy_refused"},
		bpf.ShortcutOutcomeOUTCOME_PAIRING_STALE:    {api.OutcomeConnection, "stale"},
		bpf.ShortcutOutcomeOUTCOME_UNSUPPORTED_PORT: {api.OutcomeConnection, "unsupported"},
		bpf.ShortcutOutcomeOUTCOME_SHARE:            {api.OutcomeConnection, "share"},
		bpf.ShortcutOutcomeOUTCOME_KERNEL_SOCKET:    {api.OutcomeConnection, "kernel_socket"},
		bpf.ShortcutOutcomeOUTCOME_MPTCP:            {api.OutcomeConnection, "mptcp"},
		bpf.ShortcutOutcomeOUTCOME_BLOCKING_CLIENT:  {api.OutcomeConnection, "blocking_client"},
		bpf.ShortcutOutcomeOUTCOME_BLOCKING_SERVER:  {api.OutcomeConnection, "blocking_server"},
		bpf.ShortcutOutcomeOUTCOME_CLIENT_ULP:       {api.OutcomeConnection, "client_ulp"},
		bpf.ShortcutOutcomeOUTCOME_SYNS_FULL:        {api.OutcomeConnection, "syns_full"},
		bpf.ShortcutOutcomeOUTCOME_SYN_LOST:         {api.OutcomeConnection, "syn_lost"},
		bpf.ShortcutOutcomeOUTCOME_PENDING_FULL:     {api.OutcomeConnection, "pending_full"},
		bpf.ShortcutOutcomeOUTCOME_FLOWS_FULL:       {api.OutcomeConnection, "flows_full"},
		bpf.ShortcutOutcomeOUTCOME_SOCKETS_FULL:     {api.OutcomeConnection, "sockets_full"},
		bpf.ShortcutOutcomeOUTCOME_SOCKET_BUSY:      {api.OutcomeConnection, "socket_busy"},
		bpf.ShortcutOutcomeOUTCOME_NO_MEMORY:        {api.OutcomeConnection, "no_memory"},
		bpf.ShortcutOutcomeOUTCOME_UNMATCHED:        {api.OutcomeConnection, "unmatched"},
		bpf.ShortcutOutcomeOUTCOME_CLIENT_CLOSED:    {api.OutcomeConnection, "client_closed"},
		bpf.ShortcutOutcomeOUTCOME_REUSED:           {api.OutcomeSocket, "reused"},
		bpf.ShortcutOutcomeOUTCOME_SOCKET_EVICTED:   {api.OutcomeSocket, "evicted"},
		bpf.ShortcutOutcomeOUTCOME_JOINED:           {api.OutcomeConnection, "joined"},
		bpf.ShortcutOutcomeOUTCOME_JOIN_ENDED:       {api.OutcomeConnection, "join_ended"},
		bpf.ShortcutOutcomeOUTCOME_CALLBACKS:        {api.OutcomeConnection, "no_callbacks"},
		bpf.ShortcutOutcomeOUTCOME_RETURNED:         {api.OutcomeConnection, "returned"},
		bpf.ShortcutOutcomeOUTCOME_NO_PEER:          {api.OutcomeConnection, "no_peer"},
		bpf.ShortcutOutcomeOUTCOME_EVICT_DUE:        {api.OutcomeSocket, "evict_due"},
	}
}

// MessageReasons returns all codes of Direction.Reason.
func MessageReasons() []string {
	var codes []string
	for outcome, o := range outcomes() {
		if o.kind == api.OutcomeMessage && outcome != int(bpf.ShortcutOutcomeOUTCOME_SHORTCUT) {
			codes = append(codes, o.code)
		}
	}
	return codes
}

// Outcomes returns all counters, zeroes included, in a fixed order; none after an
// unload. They count from the creation of the kernel objects on.
func (d *Datapath) Outcomes() ([]api.Outcome, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return nil, nil
	}
	var counts []api.Outcome
	for outcome, o := range outcomes() {
		sum, err := readCount(d.objects.Maps[bpf.ShortcutMapOutcomes], bpf.ShortcutOutcome(outcome))
		if err != nil {
			return nil, fmt.Errorf("read counter %s_%s: %w", o.kind, o.code, err)
		}
		counts = append(counts, api.Outcome{Kind: o.kind, Code: o.code, Count: sum.Number, Bytes: sum.Bytes})
	}
	return counts, nil
}

// readCount returns the sum of a counter over all CPUs. One that the map of an earlier
// build does not have is 0.
func readCount(m *ebpf.Map, outcome bpf.ShortcutOutcome) (sum bpf.ShortcutCount, err error) {
	var perCPU []bpf.ShortcutCount
	if err := m.Lookup(uint32(outcome), &perCPU); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return sum, err
	}
	for _, c := range perCPU {
		sum.Number += c.Number
		sum.Bytes += c.Bytes
	}
	return sum, nil
}
