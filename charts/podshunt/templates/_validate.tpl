{{/* What the schema cannot say in words: each wrong value ends with what is accepted, before
anything is installed. An agent that refused it would end again and again, on every node. */}}
{{- define "podshunt.validate" -}}
{{- $agent := .Values.agent }}
{{- $uninstall := .Values.uninstall }}
{{- $strategy := .Values.updateStrategy }}

{{- $dir := "^/[^/:]+(/[^/:]+)*$" }}
{{- $dirs := "an absolute path without a colon, without . and .. in it, and without / at its end" }}
{{- $port := "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])" }}
{{- $address := printf "^(([0-9A-Za-z.-]*|\\[[0-9A-Fa-f:.]+\\]|\\[?\\$\\(HOST_IP\\)\\]?):%s)?$" $port }}
{{- $addresses := "HOST:PORT with a port from 1 to 65535, such as \":19469\", \"127.0.0.1:19469\", \"[::1]:19469\" or \"[$(HOST_IP)]:19469\" (the node's own address), or nothing" }}
{{- $duration := "^([0-9]+(\\.[0-9]+)?(ms|s|m|h))+$" }}
{{- $checks := list
  (list "image.repository" .Values.image.repository "^([^/:@]+(:[0-9]+)?/)?[^:@]+$" "a name without a tag and a digest, for which image.tag and image.digest are")
  (list "global.imageRegistry" .Values.global.imageRegistry "^([0-9A-Za-z.-]+(:[0-9]+)?(/[0-9a-z._/-]*[0-9a-z])?)?$" "a registry such as registry.example:5000, or nothing")
  (list "image.tag" .Values.image.tag "^([0-9A-Za-z_][0-9A-Za-z_.-]{0,127})?$" "a tag, of at most 128 letters, digits and \"._-\", or nothing for the chart's appVersion")
  (list "image.digest" .Values.image.digest "^(sha256:[0-9a-f]{64})?$" "\"sha256:\" and 64 hexadecimal digits, or nothing")
  (list "the name of the DaemonSet" (include "podshunt.fullname" .) "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$" "lower-case letters, digits and \"-\": see fullnameOverride and nameOverride")
  (list "agent.cniConfDir" $agent.cniConfDir (printf "%s|^(auto)?$" $dir) (printf "%s, or auto, or nothing to install no plugin, each as for agent.cniBinDir" $dirs))
  (list "agent.cniBinDir" $agent.cniBinDir (printf "%s|^(auto)?$" $dir) (printf "%s, or auto, or nothing to install no plugin, each as for agent.cniConfDir" $dirs))
  (list "agent.cgroup" $agent.cgroup $dir $dirs)
  (list "agent.pinDir" $agent.pinDir "^/sys/fs/bpf/[^:/]+$" "a directory directly in /sys/fs/bpf, such as /sys/fs/bpf/podshunt")
  (list "agent.runDir" $agent.runDir $dir $dirs)
  (list "agent.runDir" $agent.runDir "^/[ -9;-~]{1,91}$" "at most 92 bytes of ASCII, as the kernel limits the path of the agent's socket there")
  (list "netnsDir" .Values.netnsDir $dir $dirs)
  (list "agent.refreshInterval" $agent.refreshInterval "^(0(ms|s|m|h)|[0-9]{3,}ms|[0-9]+(s|m|h))$" "a duration of at least 100ms, such as 30s, or 0s for never")
  (list "agent.policyLease" $agent.policyLease "^[0-9]+(s|m|h)$" "a duration of at least 1s, such as 5m, or 0s for ever")
  (list "agent.healthAddress" $agent.healthAddress $address $addresses)
  (list "agent.metricsAddress" $agent.metricsAddress $address $addresses)
  (list "uninstall.timeout" $uninstall.timeout $duration "a duration such as 30s or 1m30s")
  (list "podMonitor.interval" .Values.podMonitor.interval "^[0-9]+(ms|s|m|h)$" "a duration such as 30s")
}}
{{- range $agent.sandboxedRuntimeClasses }}
{{- $checks = append $checks (list "agent.sandboxedRuntimeClasses" . "^[0-9a-z.*?-]+$" "patterns of lower-case letters, digits, \".-\", * and ?, such as \"kata-*\"") }}
{{- end }}
{{- range $agent.extraArgs }}
{{- $checks = append $checks (list "agent.extraArgs" . "^--[a-z][a-z-]*(=.*)?$" "flags of podshunt-agent run, each in one piece as in \"--name=value\"") }}
{{- end }}
{{- $label := "^([0-9A-Za-z]([0-9A-Za-z._-]{0,61}[0-9A-Za-z])?)?$" }}
{{- $key := "^([0-9a-z]([0-9a-z.-]*[0-9a-z])?/)?[0-9A-Za-z]([0-9A-Za-z._-]{0,61}[0-9A-Za-z])?$" }}
{{- range $agent.defaultNamespaces.names }}
{{- $checks = append $checks (list "agent.defaultNamespaces.names" . "^[0-9a-z]([0-9a-z-]{0,61}[0-9a-z])?$" "the name of a namespace") }}
{{- end }}
{{- range $name, $value := $agent.defaultNamespaces.matchLabels }}
{{- $checks = append $checks (list "agent.defaultNamespaces.matchLabels" $name $key "the key of a label") }}
{{- $checks = append $checks (list "agent.defaultNamespaces.matchLabels" $value $label "the value of a label") }}
{{- end }}
{{- range $agent.defaultNamespaces.matchExpressions }}
{{- $checks = append $checks (list "agent.defaultNamespaces.matchExpressions" .key $key "the key of a label") }}
{{- range .values }}
{{- $checks = append $checks (list "agent.defaultNamespaces.matchExpressions" . $label "the value of a label") }}
{{- end }}
{{- if ne (empty .values) (has .operator (list "Exists" "DoesNotExist")) }}
{{- fail (printf "agent.defaultNamespaces.matchExpressions: operator %s takes %s" .operator (.values | empty | ternary "values" "no values")) }}
{{- end }}
{{- end }}
{{- range $checks }}
{{- $value := index . 1 | toString }}
{{- if or (not (regexMatch (index . 2) $value)) (and (hasPrefix "/" $value) (ne $value (clean $value))) }}
{{- fail (printf "%s: %q is not accepted; accepted is %s" (index . 0) $value (index . 3)) }}
{{- end }}
{{- end }}

{{- if not .Values.enabled }}
{{- fail "enabled=false does nothing in this chart; a chart that has it as a part names the value in `condition` of its dependency" }}
{{- end }}
{{- if and .Values.resourceQuota.enabled (not .Values.priorityClassName) }}
{{- fail "resourceQuota.enabled needs priorityClassName, the class that it is for" }}
{{- end }}
{{- if ne (empty $agent.cniConfDir) (empty $agent.cniBinDir) }}
{{- fail "agent.cniConfDir and agent.cniBinDir: accepted are both, or none to install no plugin" }}
{{- end }}
{{- if ne (eq $agent.cniConfDir "auto") (eq $agent.cniBinDir "auto") }}
{{- fail "agent.cniConfDir and agent.cniBinDir: accepted is auto for both, or for none" }}
{{- end }}
{{- if and $agent.healthAddress $agent.metricsAddress (eq (include "podshunt.port" $agent.healthAddress) (include "podshunt.port" $agent.metricsAddress)) }}
{{- fail (printf "agent.healthAddress and agent.metricsAddress: accepted are two different ports, not %s for both" (include "podshunt.port" $agent.healthAddress)) }}
{{- end }}
{{- if and .Values.podMonitor.enabled (not $agent.metricsAddress) }}
{{- fail "podMonitor.enabled needs agent.metricsAddress, as there are no metrics without it" }}
{{- end }}
{{- if gt ($agent.budget | int64) ($agent.podBudget | int64) }}
{{- fail (printf "agent.podBudget: %d is not accepted; accepted is agent.budget, %d, and above" ($agent.podBudget | int64) ($agent.budget | int64)) }}
{{- end }}
{{- if not (or .Values.serviceAccount.create .Values.serviceAccount.name) }}
{{- fail "serviceAccount.create=false needs serviceAccount.name, the account that exists" }}
{{- end }}
{{- if and (eq $strategy.type "RollingUpdate") $strategy.rollingUpdate }}
{{- with $strategy.rollingUpdate }}
{{- if not (has (toString (.maxSurge | default 0)) (list "0" "0%")) }}
{{- fail (printf "updateStrategy.rollingUpdate.maxSurge: %v is not accepted; accepted is 0, as a node runs one agent at a time" .maxSurge) }}
{{- end }}
{{- if has (toString .maxUnavailable) (list "0" "0%") }}
{{- fail "updateStrategy.rollingUpdate.maxUnavailable: 0 is not accepted; accepted are 1 or 1% and above, as a node runs one agent at a time" }}
{{- end }}
{{- end }}
{{- end }}

{{- /* An exec into an agent may take 30 s more than the timeout. */}}
{{- $least := include "podshunt.seconds" $uninstall.timeout | int64 | add 30 }}
{{- if and $uninstall.enabled (lt ($uninstall.deadlineSeconds | int64) $least) }}
{{- fail (printf "uninstall.deadlineSeconds: %d is not accepted; accepted is 30 more than uninstall.timeout, %d, and above" ($uninstall.deadlineSeconds | int64) $least) }}
{{- end }}
{{- end }}
