// SPDX-License-Identifier: Apache-2.0

// Package bpf holds podshunt's kernel programs as one object, compiled from
// shortcut.c, and the Go names of its maps, programs and types, made by
// bpf2go. Only agent/datapath imports it. `make generate` rebuilds it.
package bpf

//go:generate go tool bpf2go -target bpfel,bpfeb -output-stem shortcut -type pair -type sending -type receiving -type policy_key -type policy -type settings -type outcome -type pair_state -type verdict -type read_state Shortcut shortcut.c
