{{/*
Probes: (list $ workload). gRPC health is NOT_SERVING until weights are loaded and graphs captured. The kubelet speaks
neither TLS over gRPC nor shows certificates, so with these the container's vitrine-health asks.
*/}}
{{- define "vitrine.probes" -}}
{{- include (printf "vitrine.%sProbes" (index . 1).program) . -}}
{{- end -}}

{{- define "vitrine.encoderProbes" -}}
{{- $tls := (index . 1).tls -}}
{{- $period := 10 -}}
startupProbe:
  {{- include "vitrine.grpcProbe" (list $tls 50051 "vitrine.encoder.v1.Encoder") | nindent 2 }}
  periodSeconds: {{ $period }}
  failureThreshold: {{ include "vitrine.startupFailures" (list (index . 1) $period) }}
  timeoutSeconds: 10
readinessProbe:
  {{- include "vitrine.grpcProbe" (list $tls 50051 "vitrine.encoder.v1.Encoder") | nindent 2 }}
  periodSeconds: 5
  failureThreshold: 2
  timeoutSeconds: 5
livenessProbe:
  {{- include "vitrine.grpcProbe" (list $tls 50051 "") | nindent 2 }}
  periodSeconds: 20
  failureThreshold: 3
  timeoutSeconds: 10
{{- end -}}

{{/*
A worker is ready when it has loaded and an encoder fits; without encoders it stays alive, so that start and liveness ask
only whether it answers.
*/}}
{{- define "vitrine.llmProbes" -}}
{{- $tls := (index . 1).tls -}}
{{- $ready := include "vitrine.httpProbe" (list $tls "/ready") -}}
{{- if $tls.clientAuth }}{{ $ready = include "vitrine.grpcProbe" (list $tls 50052 "vitrine.llm.v1.Llm") }}{{ end -}}
{{- include "vitrine.serverProbes" (append . $ready) -}}
{{- end -}}

{{/* The gateway is ready when encoders and a server answer it. */}}
{{- define "vitrine.gatewayProbes" -}}
{{- $tls := (index . 1).tls -}}
{{- $ready := include "vitrine.httpProbe" (list $tls "/ready") -}}
{{- if $tls.clientAuth }}{{ $ready = include "vitrine.grpcProbe" (list $tls 50053 "") }}{{ end -}}
{{- include "vitrine.serverProbes" (append . $ready) -}}
{{- end -}}

{{/* Of vLLM and SGLang the port opens, or `/health` is 200, once the model is loaded. */}}
{{- define "vitrine.vllmProbes" -}}
{{- include "vitrine.serverProbes" (append . (include "vitrine.httpProbe" (list (index . 1).tls "/health"))) -}}
{{- end -}}

{{- define "vitrine.sglangProbes" -}}
{{- include "vitrine.vllmProbes" . -}}
{{- end -}}

{{/* (list $ workload readiness) */}}
{{- define "vitrine.serverProbes" -}}
{{- $answers := include "vitrine.httpProbe" (list (index . 1).tls "/health") -}}
{{- $period := 10 -}}
startupProbe:
  {{- $answers | nindent 2 }}
  periodSeconds: {{ $period }}
  failureThreshold: {{ include "vitrine.startupFailures" (list (index . 1) $period) }}
  timeoutSeconds: 10
readinessProbe:
  {{- index . 2 | nindent 2 }}
  periodSeconds: 5
  failureThreshold: 2
  timeoutSeconds: 5
livenessProbe:
  {{- $answers | nindent 2 }}
  periodSeconds: 20
  failureThreshold: 3
  timeoutSeconds: 10
{{- end -}}

{{/* (list tls port service) */}}
{{- define "vitrine.grpcProbe" -}}
{{- $tls := index . 0 -}}
{{- if $tls.secretName -}}
exec:
  command:
    - vitrine-health
    - localhost:{{ index . 1 }}
    {{- with index . 2 }}
    - --service={{ . }}
    {{- end }}
    - --ca-file=/etc/vitrine/tls/ca.crt
    {{- if $tls.clientAuth }}
    - --cert-file=/etc/vitrine/tls/tls.crt
    - --key-file=/etc/vitrine/tls/tls.key
    {{- end }}
{{- else -}}
grpc:
  port: {{ index . 1 }}
  {{- with index . 2 }}
  service: {{ . }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* (list tls path). Where clients must show certificates, only whether the port is open. */}}
{{- define "vitrine.httpProbe" -}}
{{- $tls := index . 0 -}}
{{- if $tls.clientAuth -}}
tcpSocket:
  port: http
{{- else -}}
httpGet:
  path: {{ index . 1 }}
  port: http
  scheme: {{ ternary "HTTPS" "HTTP" (ne $tls.secretName "") }}
{{- end -}}
{{- end -}}

{{/* (list workload period) */}}
{{- define "vitrine.startupFailures" -}}
{{- div (add (index . 0).settings.startupTimeoutSeconds (sub (index . 1) 1)) (index . 1) -}}
{{- end -}}
