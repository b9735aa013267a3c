// SPDX-License-Identifier: Apache-2.0

// Package bpf holds podshunt's kernel programs as two objects, compiled from
// shortcut.c and guard.c, and the Go names of their maps, programs and types,
// made by bpf2go. Only agent/datapath and agent/hazards import it. `make generate` rebuilds it.
package bpf

//go:generate go tool bpf2go -target bpfel,bpfeb -output-stem shortcut -type flow -type side_index -type sending -type receiving -type policy_key -type policy_prefix -type policy -type settings -type outcome -type flow_state -type verdict -type read_state -type learned_key -type learned_value -type share -type flow_id -type open_socket -type join_entry -type join_step -type unsupported -type layout Shortcut shortcut.c
//go:generate go tool bpf2go -target bpfel,bpfeb -output-stem guard -no-global-types Guard guard.c
