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

{{/* Contradictory values are an error instead of a deployment that loses sessions. */}}
{{- define "unroll.check" -}}
{{- $store := or .Values.redis.enabled .Values.store.secret }}
{{- if and .Values.redis.enabled .Values.store.secret }}
  {{- fail "store.secret names a Redis and redis.enabled creates one: set only one of them" }}
{{- end }}
{{- if and (has .Values.store.durability (list "stored" "redis")) (not $store) }}
  {{- fail "store.durability is stored, but there is no store: set redis.enabled or store.secret" }}
{{- end }}
{{- if and (or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled) (not $store) (not .Values.store.snapshotKeysSecret) }}
  {{- fail "a session in the memory of one replica is unknown to the others: set redis.enabled, store.secret, or store.snapshotKeysSecret (client-held states); or set replicas=1" }}
{{- end }}
{{- end }}
