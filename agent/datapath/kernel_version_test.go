// SPDX-License-Identifier: Apache-2.0

package datapath

import "testing"

func TestRefusesTLS(t *testing.T) {
	for _, tc := range []struct {
		v    KernelVersion
		want bool
	}{
		{KernelVersion{5, 15, 200}, false},
		{KernelVersion{6, 1, 188}, false},
		{KernelVersion{6, 1, 189}, true},
		{KernelVersion{6, 6, 200}, false},
		{KernelVersion{6, 12, 110}, false},
		{KernelVersion{6, 12, 111}, true},
		{KernelVersion{6, 18, 44}, false},
		{KernelVersion{7, 2, 12}, false}, // it came with 7.2 or 7.3
		{KernelVersion{7, 3, 4}, true},
		{KernelVersion{8, 0, 0}, true},
	} {
		if got := tc.v.RefusesTLS(); got != tc.want {
			t.Errorf("%+v: got %v, want %v", tc.v, got, tc.want)
		}
	}
}

func TestMPTCPUnsafe(t *testing.T) {
	const debian = "#1 SMP PREEMPT_DYNAMIC Debian "
	for _, tc := range []struct {
		signature, version, release string
		want                        bool
	}{
		{release: "5.6.19", want: false}, // no fall-back before 5.7
		{release: "5.7.0", want: true},
		{release: "5.10.246", want: true},
		{release: "5.10.247", want: false},
		{release: "5.15.196", want: true},
		{release: "5.15.197", want: false},
		{release: "6.1.140", want: true},
		{release: "6.1.158+", want: true},
		{release: "6.1.159", want: false},
		{release: "6.6.117", want: true},
		{release: "6.6.118", want: false},
		{release: "6.12.59", want: true},
		{release: "6.12.60", want: false},
		{release: "6.16.12", want: true}, // went out of support before the fix
		{release: "6.17.9", want: true},
		{release: "6.17.10", want: false},
		{release: "6.18.0", want: false},
		{release: "6.18", want: false},
		{release: "7.3.4", want: false},
		{release: "5.14.0-427.el9.x86_64", want: true}, // fixes of its own are not known
		{version: debian + "6.1.192-2 (2026-11-01)", release: "6.1.0-56-cloud-amd64", want: false},
		{version: debian + "6.1.140-1 (2025-05-22)", release: "6.1.0-37-cloud-amd64", want: true},
		{version: debian + "6.12.48-1 (2025-09-20)", release: "6.12.48+deb13-cloud-amd64", want: true},
		{signature: "Ubuntu 6.8.0-40.40~22.04.3-generic 6.8.12\n", release: "6.8.0-40-generic", want: true},
		{signature: "Ubuntu 6.17.0-20.20-generic 6.17.13\n", release: "6.17.0-20-generic", want: false},
	} {
		v, err := parseKernelVersion(tc.signature, tc.version, tc.release)
		if err != nil {
			t.Errorf("%+v: %v", tc, err)
		} else if got := v.MPTCPUnsafe(); got != tc.want {
			t.Errorf("%+v: got %v as %+v, want %v", tc, got, v, tc.want)
		}
	}
	if v, err := parseKernelVersion("", "", "custom"); err == nil {
		t.Errorf("got %+v for a release without a number, want an error", v)
	}
}

func TestIteratesTCP(t *testing.T) {
	for _, tc := range []struct {
		v    KernelVersion
		want bool
	}{
		{KernelVersion{5, 15, 300}, false},
		{KernelVersion{6, 1, 182}, false},
		{KernelVersion{6, 1, 183}, true},
		{KernelVersion{6, 6, 151}, false},
		{KernelVersion{6, 6, 152}, true},
		{KernelVersion{6, 8, 12}, false}, // went out of support before the fix
		{KernelVersion{6, 12, 103}, false},
		{KernelVersion{6, 12, 104}, true},
		{KernelVersion{6, 18, 44}, false},
		{KernelVersion{6, 18, 45}, true},
		{KernelVersion{7, 0, 99}, false},
		{KernelVersion{7, 1, 8}, false},
		{KernelVersion{7, 1, 9}, true},
		{KernelVersion{7, 2, 0}, true},
		{KernelVersion{8, 0, 0}, true},
	} {
		if got := tc.v.iteratesTCP(); got != tc.want {
			t.Errorf("%+v: got %v, want %v", tc.v, got, tc.want)
		}
	}
}
