{{- define "podshunt.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "podshunt.fullname" -}}
{{- $name := include "podshunt.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* The pods of the agent, and nothing else: the hook's pods have another component. */}}
{{- define "podshunt.selector" -}}
app.kubernetes.io/name: {{ include "podshunt.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: agent
{{- end }}

{{- define "podshunt.labels" -}}
{{- $own := dict
  "app.kubernetes.io/name" (include "podshunt.name" .)
  "app.kubernetes.io/instance" .Release.Name
  "app.kubernetes.io/version" .Chart.AppVersion
  "app.kubernetes.io/managed-by" .Release.Service
  "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-") }}
{{- merge $own .Values.commonLabels | toYaml }}
{{- end }}

{{- define "podshunt.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "podshunt.fullname" .) }}
{{- end }}

{{/* The first part of a name is a registry if it has a dot or a port, or is localhost. */}}
{{- define "podshunt.image" -}}
{{- $repository := .Values.image.repository }}
{{- with .Values.global.imageRegistry }}
{{- $repository = printf "%s/%s" . (regexReplaceAll "^([^/]*[.:][^/]*|localhost)/" $repository "") }}
{{- end }}
{{- with .Values.image.digest }}
{{- printf "%s@%s" $repository . }}
{{- else }}
{{- printf "%s:%s" $repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end }}
{{- end }}

{{- define "podshunt.imagePullSecrets" -}}
{{- $secrets := .Values.imagePullSecrets }}
{{- range .Values.global.imagePullSecrets }}
{{- $secrets = append $secrets (kindIs "string" . | ternary (dict "name" .) .) }}
{{- end }}
{{- with $secrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Annotations of the agent's pods. */}}
{{- define "podshunt.podAnnotations" -}}
{{- $own := dict "kubectl.kubernetes.io/default-container" "agent" }}
{{- with .Values.agent.metricsAddress }}
{{- if not (or $.Values.podMonitor.enabled (regexMatch "^(127\\.|\\[::1\\]|localhost:)" .)) }}
{{- $_ := set $own "prometheus.io/scrape" "true" }}
{{- $_ := set $own "prometheus.io/port" (include "podshunt.port" .) }}
{{- $_ := set $own "prometheus.io/path" "/metrics" }}
{{- end }}
{{- end }}
{{- if eq (include "podshunt.appArmorField" .) "" }}
{{- $profile := eq .Values.appArmorProfile "Unconfined" | ternary "unconfined" "runtime/default" }}
{{- range list "agent" "mount-bpffs" }}
{{- $_ := set $own (printf "container.apparmor.security.beta.kubernetes.io/%s" .) $profile }}
{{- end }}
{{- end }}
{{- merge dict .Values.podAnnotations $own | toYaml }}
{{- end }}

{{/* Not empty if the cluster knows the field appArmorProfile; older ones take annotations. */}}
{{- define "podshunt.appArmorField" -}}
{{- if semverCompare ">=1.30-0" .Capabilities.KubeVersion.Version }}yes{{ end }}
{{- end }}

{{/* 80 % of a quantity of memory in bytes: the rest is for kernel maps, which Go does not see.
Empty for a quantity in another form. */}}
{{- define "podshunt.goMemory" -}}
{{- $text := kindIs "string" . | ternary . (printf "%.0f" (float64 .)) }}
{{- if regexMatch "^[0-9]+(\\.[0-9]+)?(k|M|G|Ki|Mi|Gi)?$" $text }}
{{- $factors := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 }}
{{- mulf (regexFind "^[0-9.]+" $text | float64) (get $factors (regexFind "[A-Za-z]*$" $text)) 0.8 | int64 }}
{{- end }}
{{- end }}

{{/* The port of an address. */}}
{{- define "podshunt.port" -}}
{{- regexFind "[0-9]+$" . }}
{{- end }}

{{/* A probe of the agent at a path. The kubelet asks the node's own address unless told otherwise. */}}
{{- define "podshunt.probe" -}}
httpGet:
  path: {{ .path }}
  port: health
  {{- with regexReplaceAll ":[0-9]+$" .address "" | trimPrefix "[" | trimSuffix "]" | replace "$(HOST_IP)" "" }}
  host: {{ . | quote }}
  {{- end }}
timeoutSeconds: 5
{{- end }}

{{/* A duration such as 1m30s in seconds. */}}
{{- define "podshunt.seconds" -}}
{{- $start := toDate "2006-01-02" "2001-01-01" }}
{{- sub (mustDateModify . $start | unixEpoch) (unixEpoch $start) }}
{{- end }}

{{/* Seconds that an agent may take to end: 5 to learn whether its DaemonSet is deleted, then the uninstall, which may take 30 more to
reset connections, and 10 for the rest. */}}
{{- define "podshunt.grace" -}}
{{- $timeout := include "podshunt.seconds" .Values.uninstall.timeout | int64 }}
{{- ternary (add 15 $timeout (ternary 30 0 .Values.uninstall.force)) 10 .Values.uninstall.enabled }}
{{- end }}

{{/* A label selector as kubectl takes it. */}}
{{- define "podshunt.namespaceSelector" -}}
{{- $terms := list }}
{{- with .names }}
{{- $terms = append $terms (printf "kubernetes.io/metadata.name in (%s)" (join "," .)) }}
{{- end }}
{{- range $key, $value := .matchLabels }}
{{- $terms = append $terms (printf "%s=%s" $key $value) }}
{{- end }}
{{- range .matchExpressions }}
{{- $formats := dict "In" "%s in (%s)" "NotIn" "%s notin (%s)" "Exists" "%s" "DoesNotExist" "!%s" }}
{{- $format := get $formats .operator }}
{{- if .values }}
{{- $terms = append $terms (printf $format .key (join "," .values)) }}
{{- else }}
{{- $terms = append $terms (printf $format .key) }}
{{- end }}
{{- end }}
{{- join "," $terms }}
{{- end }}
