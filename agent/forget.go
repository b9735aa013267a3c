// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/podshunt/podshunt/api"
)

func newForgetCommand() *cobra.Command {
	var runDir string
	var req api.Selector
	cmd := &cobra.Command{
		Use:   "forget [NAMESPACE/NAME [PORT]]",
		Short: "Pair connections again that were found not to fit",
		Long: `Forgets what connections to server ports have used that the shortcut does not
serve: those of one port of a pod, those of a pod, or all. New connections to
these ports are paired again. "podshunt-agent status" lists them as NOT PAIRED.`,
		Example: `  podshunt-agent forget
  podshunt-agent forget default/web
  podshunt-agent forget default/web 8080`,
		Args: func(_ *cobra.Command, args []string) (err error) {
			req, err = parseForget(args)
			return err
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			var result api.ForgetResult
			if err := ask(cmd.Context(), runDir, http.MethodPost, api.PathForget+"?"+req.Query(), askTimeout, &result); err != nil {
				return err
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "server ports forgotten: %d\n", result.Forgotten)
			return err
		},
	}
	runDirVar(cmd, &runDir)
	return cmd
}

func parseForget(args []string) (api.Selector, error) {
	var req api.Selector
	if len(args) > 2 {
		return req, fmt.Errorf("unexpected argument %q: accepted are a pod and a port", args[2])
	}
	if len(args) > 0 {
		if err := checkPod(args[0]); err != nil {
			return req, err
		}
		req.Pod = args[0]
	}
	if len(args) > 1 {
		port, err := strconv.ParseUint(args[1], 10, 16)
		if err != nil || port == 0 {
			return req, fmt.Errorf("port %q: accepted are 1 to 65535", args[1])
		}
		req.Port = uint16(port)
	}
	return req, nil
}

// checkPod accepts a namespace and a name.
func checkPod(pod string) error {
	if namespace, name, ok := strings.Cut(pod, "/"); !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return fmt.Errorf("pod %q: accepted is namespace/name", pod)
	}
	return nil
}
