// SPDX-License-Identifier: Apache-2.0

// Release makes the files that podshunt is delivered as: the image, without a
// container engine, the chart, and what a release has beside them. The same
// binaries, chart and changelog make the same bytes, wherever and whenever.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

const usage = `usage: release COMMAND [FLAG]..., and -h after a command for its flags
  image    packs an archive of the image
  chart    packages the chart
  files    makes all files of a release
  push     pushes a release's image and chart to a registry
`

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

func run(args []string, stdout io.Writer) error {
	if len(args) == 0 {
		return fmt.Errorf("no command\n%s", usage)
	}
	flags := flag.NewFlagSet(args[0], flag.ExitOnError)
	b := build{binaries: map[string]string{}}
	var output, image, from, to string
	buildFlags := func() {
		flags.StringVar(&b.top, "top", "../..", "the repository's `directory`")
		flags.StringVar(&b.version, "version", "0.0.0", "`version` of image and chart, as helm takes it")
		flags.StringVar(&b.revision, "revision", "", "the `commit` that they are built from")
		flags.Func("created", "when that was made, in `seconds` since 1970 (default 0)", func(s string) error {
			seconds, err := strconv.ParseInt(s, 10, 64)
			b.created = time.Unix(seconds, 0)
			return err
		})
		flags.Func("binaries", "`[ARCHITECTURE=]DIRECTORY` of podshunt and podshunt-agent; once for each architecture (default this machine's)", func(s string) error {
			architecture, dir, found := strings.Cut(s, "=")
			if !found {
				architecture, dir = runtime.GOARCH, s
			}
			b.binaries[architecture] = dir
			return nil
		})
	}
	var do func() error
	switch args[0] {
	case "image":
		buildFlags()
		flags.StringVar(&image, "name", "ghcr.io/podshunt/podshunt:devel", "name and tag of the image")
		flags.StringVar(&output, "o", "podshunt-image.tar", "`file` to write")
		do = func() error {
			digest, err := b.writeImage(output, image)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(stdout, "%s: %s, %s\n", output, image, digest)
			return err
		}
	case "chart":
		buildFlags()
		flags.StringVar(&output, "o", ".", "`directory` to write to")
		do = func() error {
			chart, err := b.chart()
			if err != nil {
				return err
			}
			path := filepath.Join(output, chart.file())
			if err := os.WriteFile(path, chart.archive, 0o644); err != nil {
				return err
			}
			_, err = fmt.Fprintf(stdout, "%s: installs %s\n", path, chart.image)
			return err
		}
	case "files":
		buildFlags()
		flags.StringVar(&output, "o", "dist", "`directory` to write to")
		do = func() error { return b.writeFiles(output) }
	case "push":
		flags.StringVar(&from, "from", "dist", "`directory` of a release's files")
		flags.StringVar(&to, "to", "", "`registry` and path, such as ghcr.io/podshunt")
		do = func() error { return push(stdout, from, to) }
	default:
		return fmt.Errorf("no command %q\n%s", args[0], usage)
	}
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	return do()
}

// build is what all files of a release are made of.
type build struct {
	top               string
	version, revision string
	// created is when the revision was made: no file may depend on the time of a build.
	created time.Time
	// binaries is the directory of each architecture's.
	binaries map[string]string
}
