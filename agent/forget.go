// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/podshunt/podshunt/api"
)

func newForgetCommand() *cobra.Command {
	var runDir string
	var req api.ForgetRequest
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
			query := url.Values{"pod": {req.Pod}, "port": {strconv.Itoa(int(req.Port))}}
			var result api.ForgetResult
			if err := ask(cmd.Context(), runDir, http.MethodPost, api.PathForget+"?"+query.Encode(), askTimeout, &result); err != nil {
				return err
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "server ports forgotten: %d\n", result.Forgotten)
			return err
		},
	}
	runDirVar(cmd, &runDir)
	return cmd
}

func parseForget(args []string) (api.ForgetRequest, error) {
	var req api.ForgetRequest
	if len(args) > 2 {
		return req, fmt.Errorf("unexpected argument %q: accepted are a pod and a port", args[2])
	}
	if len(args) > 0 {
		if namespace, name, ok := strings.Cut(args[0], "/"); !ok || namespace == "" || name == "" {
			return req, fmt.Errorf("pod %q: accepted is namespace/name", args[0])
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
