// SPDX-License-Identifier: Apache-2.0

// Package docs holds the documents that tests read.
package docs

import _ "embed"

// Limits is limits.md.
//
//go:embed limits.md
var Limits string

// Platforms is platforms.md.
//
//go:embed platforms.md
var Platforms string
