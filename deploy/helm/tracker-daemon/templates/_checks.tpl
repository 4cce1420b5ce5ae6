{{/* Stops with a message where values do not go together, before the cluster finds out. */}}
{{- define "tracker-daemon.checks" -}}
{{- with .Values }}
{{- $need := add (mul 2 .shutdownTimeout) .preStop .linger -}}
{{- if le (int .terminationGracePeriod) (int $need) }}
{{- fail (printf "terminationGracePeriod, %d s, must be longer than preStop, twice shutdownTimeout and linger: more than %d s" (int .terminationGracePeriod) (int $need)) }}
{{- end -}}
{{- if and .database.embedded (gt (int .replicas) 1) }}
{{- fail (printf "database.embedded is a PostgreSQL in each pod, with sums of its own: replicas must be 1, not %d" (int .replicas)) }}
{{- end -}}
{{- end }}
{{- include "tracker-daemon.checkInterval" . }}
{{- include "tracker-daemon.checkJournal" . }}
{{- include "tracker-daemon.checkMemory" . }}
{{- include "tracker-daemon.checkBudget" . }}
{{- end }}

{{- define "tracker-daemon.checkInterval" -}}
{{- with .Values }}
{{- $interval := mul (regexFind "^[0-9]+" .podMonitor.interval) (get (dict "ms" 1 "s" 1000 "m" 60000) (regexFind "[a-z]+$" .podMonitor.interval)) }}
{{- if and .podMonitor.enabled (le (mul 1000 .linger) $interval) }}
{{- fail (printf "linger, %d s, must be longer than podMonitor.interval, %s: else no scrape sees the calls that a drain has lost" (int .linger) .podMonitor.interval) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "tracker-daemon.checkJournal" -}}
{{- $quota := .Values.settings.JOURNAL_QUOTA | default "1GiB" | include "tracker-daemon.plain" }}
{{- $size := .Values.journal.size }}
{{- if not (regexMatch "^(?i)[0-9]+ *([kmg]ib|b)?$" $quota) }}
{{- fail (printf "settings.JOURNAL_QUOTA must be bytes, or with KiB, MiB or GiB (64MiB), not %q" $quota) }}
{{- end }}
{{- $need := divf (mulf (include "tracker-daemon.bytes" $quota) 11) 10 }}
{{- if and .Values.journal.enabled (lt (include "tracker-daemon.bytes" $size | float64) $need) }}
{{- fail (printf "journal.size, %s, is too small for settings.JOURNAL_QUOTA, %s: it must be a tenth larger, for what the file system needs itself; at least %.0fMi" $size $quota (ceil (divf $need 1048576))) }}
{{- end }}
{{- end }}

{{/* A thread held takes some 600 bytes. Killed for want of memory a daemon is just when it holds most: the database is away. */}}
{{- define "tracker-daemon.checkMemory" -}}
{{- $limit := dig "limits" "memory" "" .Values.resources | include "tracker-daemon.plain" }}
{{- $held := .Values.settings.MAX_PENDING | default "1000000" | include "tracker-daemon.plain" }}
{{- $need := addf 67108864 (mulf 600 ($held | float64)) }}
{{- if and (regexMatch "^[0-9.]+([kMGT]|[KMGT]i)?$" $limit) (lt (include "tracker-daemon.bytes" $limit | float64) $need) }}
{{- fail (printf "resources.limits.memory, %s, is too small for settings.MAX_PENDING, %s, of some 600 bytes each: at least %.0fMi, or fewer" $limit $held (ceil (divf $need 1048576))) }}
{{- end }}
{{- end }}

{{/* Bytes of a size, as Kubernetes (Gi, G) or the daemon (GiB) writes it. */}}
{{- define "tracker-daemon.bytes" -}}
{{- $unit := regexFind "[A-Za-z]*$" . | lower | trimSuffix "b" }}
{{- $factors := dict "" 1 "k" 1e3 "m" 1e6 "g" 1e9 "t" 1e12 "ki" 1024 "mi" 1048576 "gi" 1073741824 "ti" 1099511627776 }}
{{- printf "%.0f" (mulf (regexFind "^[0-9.]+" .) (get $factors $unit)) }}
{{- end }}

{{/* With one replica there is no other choice than that one. */}}
{{- define "tracker-daemon.checkBudget" -}}
{{- $most := toString .Values.podDisruptionBudget.maxUnavailable }}
{{- $replicas := int .Values.replicas }}
{{- $pods := atoi (trimSuffix "%" $most) }}
{{- if hasSuffix "%" $most }}
{{- $pods = divf (mul $pods $replicas) 100 | ceil | int }}
{{- end }}
{{- if .Values.podDisruptionBudget.enabled }}
{{- if and (eq $pods 0) (ne $replicas 0) }}
{{- fail (printf "podDisruptionBudget.maxUnavailable, %s, would keep every node with a replica from being drained: at least 1" $most) }}
{{- end }}
{{- if and (ge $pods $replicas) (gt $replicas 1) }}
{{- fail (printf "podDisruptionBudget.maxUnavailable, %s, would let all %d replicas go at once: fewer than replicas" $most $replicas) }}
{{- end }}
{{- end }}
{{- end }}
