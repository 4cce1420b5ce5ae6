{{- define "tracker-daemon.name" -}}
{{- if contains "tracker-daemon" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-tracker-daemon" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "tracker-daemon.selector" -}}
app.kubernetes.io/name: tracker-daemon
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tracker-daemon.labels" -}}
{{ include "tracker-daemon.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "tracker-daemon.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "tracker-daemon.tokenSecret" -}}
{{- if .Values.token.create }}{{ include "tracker-daemon.name" . }}-token{{ else }}{{ .Values.token.existingSecret }}{{ end }}
{{- end }}

{{/* The settings, as environment variables. */}}
{{- define "tracker-daemon.settings" -}}
{{- if .Values.database.embedded }}
TRACKER_DATABASE: embedded:/var/lib/tracker/postgres
{{- else }}
TRACKER_DATABASE_FILE: /etc/tracker-daemon/database
{{- end }}
TRACKER_TOKEN_FILE: /etc/tracker-daemon/token
TRACKER_LISTEN: unix:/run/tracker-daemon/tracker.sock 0.0.0.0:{{ .Values.port }}
{{- if .Values.journal.enabled }}
TRACKER_JOURNAL: /var/lib/tracker/journal
{{- end }}
TRACKER_SHUTDOWN_TIMEOUT: {{ .Values.shutdownTimeout | quote }}
TRACKER_LINGER: {{ .Values.linger | quote }}
{{- range $name, $value := .Values.settings }}
TRACKER_{{ $name }}: {{ include "tracker-daemon.plain" $value | quote }}
{{- end }}
{{- end }}

{{/* A setting as text. Numbers of a values file are floats, and 2000000 would come out as 2e+06. */}}
{{- define "tracker-daemon.plain" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ printf "%.0f" . }}{{ else }}{{ toString . }}{{ end }}
{{- end }}

{{- define "tracker-daemon.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "tracker-daemon.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* The daemon's container; as a sidecar it goes among the init containers. */}}
{{- define "tracker-daemon.container" -}}
{{- $sidecar := eq .Values.mode "sidecar" -}}
- name: tracker-daemon
  image: {{ include "tracker-daemon.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  {{- if $sidecar }}
  restartPolicy: Always
  {{- end }}
  args: [serve]
  envFrom:
    - configMapRef:
        name: {{ include "tracker-daemon.name" . }}
  {{- with .Values.extraEnv }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  ports:
    - name: tracker
      containerPort: {{ .Values.port }}
  startupProbe:
    httpGet: {path: /livez, port: {{ .Values.port }}}
    periodSeconds: 2
    timeoutSeconds: 5
    failureThreshold: {{ div .Values.probes.startupSeconds 2 }}
  livenessProbe:
    httpGet: {path: /livez, port: {{ .Values.port }}}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 3
  readinessProbe:
    httpGet: {path: {{ .Values.probes.readiness | default (ternary "/livez" "/readyz" (or $sidecar .Values.journal.enabled)) }}, port: {{ .Values.port }}}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 2
  {{- if not $sidecar }}
  lifecycle:
    preStop:
      exec:
        command: [sleep, {{ .Values.preStop | quote }}]
  {{- end }}
  securityContext:
    {{- include "tracker-daemon.security" . | nindent 4 }}
  resources:
    {{- toYaml .Values.resources | nindent 4 }}
  volumeMounts:
    {{- if .Values.journal.enabled }}
    - name: journal
      mountPath: /var/lib/tracker
    {{- else if .Values.database.embedded }}
    - name: postgres
      mountPath: /var/lib/tracker
    {{- end }}
    - name: socket
      mountPath: /run/tracker-daemon
    - name: secrets
      mountPath: /etc/tracker-daemon
      readOnly: true
    {{- with .Values.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* Its volumes; the journal's is a claim of the StatefulSet's, never an emptyDir, which would go with the pod. */}}
{{- define "tracker-daemon.volumes" -}}
- name: socket
  emptyDir:
    medium: Memory
    sizeLimit: 1Mi
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      {{- if not .Values.database.embedded }}
      - secret:
          name: {{ .Values.database.existingSecret }}
          items:
            - key: {{ .Values.database.key }}
              path: database
      {{- end }}
      {{- include "tracker-daemon.tokenSource" . | nindent 6 }}
{{- if and .Values.database.embedded (not .Values.journal.enabled) }}
- name: postgres
  emptyDir:
    sizeLimit: {{ .Values.journal.size }}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "tracker-daemon.tokenSource" -}}
- secret:
    name: {{ include "tracker-daemon.tokenSecret" . }}
    items:
      - key: {{ .Values.token.key }}
        path: token
{{- end }}

{{- define "tracker-daemon.pod" -}}
metadata:
  labels:
    {{- include "tracker-daemon.selector" . | nindent 4 }}
    tracker-daemon/scrape: "true"
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "tracker-daemon.settings" . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "tracker-daemon.name" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .Values.terminationGracePeriod }}
  securityContext:
    {{- include "tracker-daemon.podSecurity" . | nindent 4 }}
  {{- range $name := list "imagePullSecrets" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
  {{- with index $.Values $name }}
  {{ $name }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  {{- if eq .Values.mode "sidecar" }}
  initContainers:
    {{- include "tracker-daemon.container" . | nindent 4 }}
  containers:
    - name: chat-server
      image: {{ required "mode sidecar needs chatServer.image" .Values.chatServer.image }}
      {{- range $name := list "command" "args" "env" "envFrom" "startupProbe" "livenessProbe" "readinessProbe" }}
      {{- with index $.Values.chatServer $name }}
      {{ $name }}:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- end }}
      ports:
        - name: chat
          containerPort: {{ .Values.chatServer.port }}
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ .Values.preStop | quote }}]
      securityContext:
        {{- include "tracker-daemon.security" . | nindent 8 }}
      resources:
        {{- toYaml .Values.chatServer.resources | nindent 8 }}
      volumeMounts:
        - name: socket
          mountPath: /run/tracker-daemon
        - name: token
          mountPath: /etc/tracker-daemon
          readOnly: true
        {{- if .Values.journal.enabled }}
        # For journals of its own trackers: what they have not sent yet, the daemon's does not hold.
        - name: journal
          mountPath: /var/lib/tracker
          subPath: chat-server
        {{- end }}
        {{- with .Values.chatServer.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  {{- else }}
  containers:
    {{- include "tracker-daemon.container" . | nindent 4 }}
  {{- end }}
  volumes:
    {{- include "tracker-daemon.volumes" . | nindent 4 }}
    {{- if eq .Values.mode "sidecar" }}
    - name: token
      projected:
        defaultMode: 0440
        sources:
          {{- include "tracker-daemon.tokenSource" . | nindent 10 }}
    {{- with .Values.chatServer.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- end }}
{{- end }}
