{{- define "unroll.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end -}}
{{- end }}

{{- define "unroll.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "unroll.labels" -}}
{{ include "unroll.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* The Secret with the password of the chart's Redis. */}}
{{- define "unroll.passwordSecret" -}}
{{- .Values.redis.passwordSecret | default (printf "%s-redis" (include "unroll.name" .)) -}}
{{- end }}

{{/* Seconds from the beginning of preStop to SIGKILL. */}}
{{- define "unroll.grace" -}}
{{- $least := add .Values.preStopSeconds .Values.drainTimeout -}}
{{- $wanted := int .Values.terminationGracePeriodSeconds -}}
{{- if and $wanted (le $wanted (int $least)) }}
  {{- fail (printf "terminationGracePeriodSeconds is %d, but preStopSeconds and drainTimeout are %d together: give it more, or remove it" $wanted $least) }}
{{- end -}}
{{- $wanted | default (add $least 15) -}}
{{- end }}

{{/* Contradictory values are an error instead of a deployment that loses sessions. */}}
{{- define "unroll.check" -}}
{{- $embedded := .Values.store.embedded.enabled }}
{{- $store := or .Values.redis.enabled .Values.store.secret $embedded }}
{{- if and .Values.redis.enabled .Values.store.secret }}
  {{- fail "store.secret names a Redis and redis.enabled creates one: set only one of them" }}
{{- end }}
{{- if and $embedded (or .Values.redis.enabled .Values.store.secret) }}
  {{- fail "store.embedded.enabled keeps sessions in a folder: remove store.secret and set redis.enabled=false" }}
{{- end }}
{{- if and $embedded (or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled) }}
  {{- fail "a folder of sessions belongs to one replica: set replicas=1 and autoscaling.enabled=false; args={--workers,4} serves on more cores" }}
{{- end }}
{{- if and (has .Values.store.durability (list "stored" "redis")) (not $store) }}
  {{- fail "store.durability is stored, but there is no store: set redis.enabled, store.secret or store.embedded.enabled" }}
{{- end }}
{{- if and (or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled) (not $store) (not .Values.store.snapshotKeysSecret) }}
  {{- fail "a session in the memory of one replica is unknown to the others: set redis.enabled, store.secret, or store.snapshotKeysSecret (client-held states); or set replicas=1" }}
{{- end }}
{{- if or (contains "--drain-timeout" (join " " .Values.args)) (contains "UNROLL_DRAIN_TIMEOUT" (toJson .Values.env)) }}
  {{- fail "set drainTimeout instead of --drain-timeout: terminationGracePeriodSeconds follows from it" }}
{{- end }}
{{- end }}
