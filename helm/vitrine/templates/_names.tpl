{{/* Names, labels and images. */}}

{{/* Release and chart in one name, without suffix. */}}
{{- define "vitrine.base" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name }}{{ .Release.Name }}{{ else }}{{ printf "%s-%s" .Release.Name $name }}{{ end -}}
{{- end -}}
{{- end -}}

{{/*
Name of an object: (list $ suffix), at most 46 characters: Kubernetes cuts the names of a Deployment's pods beyond that,
and KubeRay takes no more than 47. What is too long is cut and gets a hash, so that two long ones do not meet.
*/}}
{{- define "vitrine.name" -}}
{{- $base := include "vitrine.base" (index . 0) -}}
{{- $end := index . 1 | printf "-%s" | trimSuffix "-" -}}
{{- $room := sub 46 (len $end) | int -}}
{{- if gt (len $base) $room -}}
{{- $base = printf "%s-%s" (trunc (int (sub $room 7)) $base | trimSuffix "-") (sha256sum $base | trunc 6) -}}
{{- end -}}
{{- $base }}{{ $end -}}
{{- end -}}

{{/*
Labels that selectors use: (list $ component), component may be empty. No value changes them: Kubernetes refuses another
selector for a Deployment that is there.
*/}}
{{- define "vitrine.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- with index . 1 }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{/* Labels of objects: (list $ component). */}}
{{- define "vitrine.labels" -}}
{{- $root := index . 0 -}}
{{ include "vitrine.selectorLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Name of the Service that users call. In mode rayservice KubeRay makes it. */}}
{{- define "vitrine.usersService" -}}
{{- if eq .Values.mode "rayservice" -}}
{{- include "vitrine.name" (list . "") }}-serve-svc
{{- else -}}
{{- include "vitrine.name" (list . (ternary "gateway" "llm" (eq (include "vitrine.hasGateway" .) "true"))) -}}
{{- end -}}
{{- end -}}

{{/* Name of a component's ServiceAccount: (list $ component). */}}
{{- define "vitrine.serviceAccountName" -}}
{{- $root := index . 0 -}}
{{- $account := index $root.Values.serviceAccounts (index . 1) -}}
{{- if $account.create -}}
{{- default (include "vitrine.name" .) $account.name -}}
{{- else -}}
{{- default "default" $account.name -}}
{{- end -}}
{{- end -}}

{{/* An image: (list $ repository tag). */}}
{{- define "vitrine.image" -}}
{{- $image := list (index . 0).Values.images.registry (index . 1) | compact | join "/" -}}
{{- if regexMatch "(:[^/]+|@.+)$" $image -}}
{{- $image -}}
{{- else -}}
{{- printf "%s:%s" $image (index . 2) -}}
{{- end -}}
{{- end -}}
