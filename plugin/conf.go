// SPDX-License-Identifier: Apache-2.0

// What the runtime hands to the plugin.

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/podshunt/podshunt/api"
)

// config is our section of a conflist as the runtime completes it.
type config struct {
	types.PluginConf
	own api.PluginConf
}

func parseConfig(stdin []byte) (*config, error) {
	conf := &config{}
	decoder := json.NewDecoder(bytes.NewReader(stdin))
	// prevResult is decoded into a map, where a float64 would change large numbers.
	decoder.UseNumber()
	if err := decoder.Decode(&conf.PluginConf); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "decode network configuration", err.Error())
	}
	var err error
	if conf.own, err = api.ParseConf(stdin); err != nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "configuration of plugin "+api.PluginType, err.Error())
	}
	return conf, nil
}

// prevResult returns the result of the plugins before us, both as the bytes that an
// ADD prints and decoded.
func (c *config) prevResult() ([]byte, *types100.Result, error) {
	if c.RawPrevResult == nil {
		return nil, nil, types.NewError(types.ErrInvalidNetworkConfig, "no prevResult: plugin "+api.PluginType+" only runs chained",
			fmt.Sprintf(`accepted is {"type": %q} in "plugins" of a .conflist, after the plugin that makes the interface`, api.PluginType))
	}
	// A result without a version has the configuration's.
	if version, _ := c.RawPrevResult["cniVersion"].(string); version == "" {
		c.RawPrevResult["cniVersion"] = c.CNIVersion
	}
	printed, result, err := convertResult(c.RawPrevResult, c.CNIVersion)
	if err != nil {
		return nil, nil, types.NewError(types.ErrDecodingFailure, "decode prevResult", err.Error())
	}
	return printed, result, nil
}

// convertResult returns a result as JSON in the given version, and decoded in the
// library's newest. A result that has the version already stays as it is, since the
// library's types drop keys that they do not know.
func convertResult(raw map[string]any, version string) ([]byte, *types100.Result, error) {
	printed, err := json.Marshal(raw)
	if err != nil {
		return nil, nil, err
	}
	result, err := create.CreateFromBytes(printed)
	if err != nil {
		return nil, nil, err
	}
	if result.Version() != version {
		converted, err := result.GetAsVersion(version)
		if err != nil {
			return nil, nil, err
		}
		if printed, err = json.Marshal(converted); err != nil {
			return nil, nil, err
		}
	}
	newest, err := types100.GetResult(result)
	return printed, newest, err
}

func (c *config) attachmentID(args *skel.CmdArgs) api.AttachmentID {
	return api.AttachmentID{Network: c.Name, ContainerID: args.ContainerID, IfName: args.IfName}
}

func (c *config) attachment(args *skel.CmdArgs, result *types100.Result) api.Attachment {
	attachment := api.Attachment{AttachmentID: c.attachmentID(args), Netns: args.Netns, Pod: podRef(args)}
	for _, ip := range result.IPs {
		if addr, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			attachment.Addresses = append(attachment.Addresses, addr.Unmap())
		}
	}
	return attachment
}

// podRef parses CNI_ARGS itself: types.LoadArgs refuses values that contain "=", and
// nothing that a runtime adds there may keep a pod from starting.
func podRef(args *skel.CmdArgs) api.PodRef {
	pod := api.PodRef{Name: args.ContainerID}
	for pair := range strings.SplitSeq(args.Args, ";") {
		key, value, _ := strings.Cut(pair, "=")
		switch key {
		case "K8S_POD_NAMESPACE":
			pod.Namespace = value
		case "K8S_POD_NAME":
			pod.Name = value
		case "K8S_POD_UID":
			pod.UID = value
		}
	}
	return pod
}
