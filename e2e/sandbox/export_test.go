// SPDX-License-Identifier: Apache-2.0

package sandbox

// For tests.
const ThreadNetns = threadNetns

var ProcessName = processName
