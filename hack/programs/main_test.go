// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

func TestTable(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"programs":        "redis\nproxy, fast\ncurl\nnever run\n",
		"6.12/redis.json": `{"program":"redis","version":"7.0","kernel":"6.12.117","works":true,"first":{"sent":100,"shortcut":70},"again":{"sent":1000,"shortcut":999}}`,
		"6.1/redis.json":  `{"program":"redis","version":"7.0","kernel":"6.1.192","works":true,"first":{"sent":8,"shortcut":8},"again":{"sent":8,"shortcut":8}}`,
		"6.1/proxy.json": `{"program":"proxy, fast","version":"1","kernel":"6.1.192","works":true,"first":{"sent":10,"shortcut":6},
			"again":{"sent":10,"shortcut":4,"counted":{"message_shortcut":{"count":2,"bytes":4},"message_not_seen":{"count":9,"bytes":2},"message_budget":{"count":1,"bytes":4}}}}`,
		"6.12/proxy.json": `{"program":"proxy, fast","version":"1","kernel":"6.12.117","works":false,"first":{"sent":0},"again":{"sent":0}}`,
		"6.1/curl.json": `{"program":"curl","version":"8","kernel":"6.1.192","works":true,"first":{"sent":0},
			"again":{"sent":0,"counted":{"connection_blocking_client":{"count":4}}}}`,
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	doc := filepath.Join(dir, "limits.md")
	if err := os.WriteFile(doc, []byte("before\n"+begin+"\nold\n"+end+"\nafter\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time nothing changes
		if err := run([]string{"-w", doc, dir}, nil); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		want := "before\n" + begin + `

| program | version | 6.1.192 | 6.12.117 | mostly on TCP because of |
| --- | --- | --- | --- | --- |
| redis | 7.0 | 100 % | 70 %, 99 % |  |
| proxy, fast | 1 | 60 %, 40 % | **fails** | ` + "`message_budget`" + ` |
| curl | 8 | on TCP | not run | ` + "`connection_blocking_client`" + ` |

` + end + "\nafter\n"
		if diff := gocmp.Diff(want, string(got)); diff != "" {
			t.Errorf("table (-want +got):\n%s", diff)
		}
	}
	if err := os.WriteFile(doc, []byte("no marks\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run([]string{"-w", doc, dir}, nil); err == nil {
		t.Error("got no error for a file without marks")
	}
}
