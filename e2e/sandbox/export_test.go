// SPDX-License-Identifier: Apache-2.0

package sandbox

// For tests.
const ThreadNetns = threadNetns

// ProcessName names the run that a process would own.
func ProcessName(pid int) (string, error) {
	all, err := runs()
	if err != nil {
		return "", err
	}
	return all.NameOf(pid)
}
