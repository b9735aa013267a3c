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
app.kubernetes.io/name: {{ include "podshunt.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "podshunt.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "podshunt.fullname" .) }}
{{- end }}

{{- define "podshunt.image" -}}
{{- with .Values.image.digest }}
{{- printf "%s@%s" $.Values.image.repository . }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
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

{{/* Seconds that an agent may take to end: 5 to learn whether its DaemonSet is deleted, then the uninstall, which may take 30 more to
reset connections, and 10 for the rest. */}}
{{- define "podshunt.grace" -}}
{{- $start := toDate "2006-01-02" "2001-01-01" }}
{{- $timeout := sub (mustDateModify .Values.uninstall.timeout $start | unixEpoch) (unixEpoch $start) }}
{{- ternary (add 15 $timeout (ternary 30 0 .Values.uninstall.force)) 10 .Values.uninstall.enabled }}
{{- end }}
