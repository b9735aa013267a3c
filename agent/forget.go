// SPDX-License-Identifier: Apache-2.0

// The command forget.

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
		Short: "Forget what was learned of server ports, such as that they are unsupported",
		Long: `A server port is unsupported once a connection to it has used a call that does
not work on the shortcut, such as splice: new connections to it stay on TCP.
"podshunt-agent status" lists such ports under NOT PAIRED.

It also lists ports whose NEW CONNECTIONS JOIN at their handshake, as the shortcut
pays for earlier ones, or later than others, as earlier ones have ended too soon.

This forgets one port of a pod, all ports of a pod, or all ports of the node, so
that new connections to them can be paired again, and join as to other ports. Use
it after a change of the program. A port whose program makes such a call again is
unsupported again.`,
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

// checkPod returns an error unless pod is NAMESPACE/NAME.
func checkPod(pod string) error {
	if namespace, name, ok := strings.Cut(pod, "/"); !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return fmt.Errorf("pod %q: accepted is namespace/name", pod)
	}
	return nil
}
