"use strict";
// English is the key; what has no Korean stays English.
const KOREAN = {
  "Overview": "개요", "Loss": "손실", "Timeline": "타임라인", "Ops": "연산", "Modules": "모듈", "Layers": "레이어",
  "Communication": "통신", "Collectives and messages": "집합 통신과 메시지", "Memory": "메모리", "Roofline": "루프라인",
  "Critical path": "임계 경로", "Devices": "장치", "Faults": "결함", "Where the time went": "시간 분포",
  "Measured and predicted": "측정과 예측", "measured": "측정", "predicted": "예측", "both": "둘 다", "Light": "밝게",
  "Dark": "어둡게", "state": "상태", "steps": "스텝 수", "tokens/s, median": "초당 토큰(중앙값)", "plan": "분할 계획",
  "model": "모델", "ranks": "랭크 수", "nodes": "노드 수", "step time, measured": "스텝 시간(측정)",
  "step time, predicted": "스텝 시간(예측)", "cluster": "클러스터", "name": "이름", "kind": "종류", "phase": "단계",
  "count": "횟수", "time": "시간", "share": "비율", "bytes": "바이트", "axis": "축", "size": "크기", "rank": "랭크",
  "compute": "계산", "communication": "통신", "host": "호스트", "exposed communication": "드러난 통신", "idle": "유휴",
  "waiting": "대기", "module": "모듈", "filter": "거르기", "Show more": "더 보기", "rows": "행", "of": "/",
  "Zoom in": "확대", "Zoom out": "축소", "Whole": "전체", "Host ops": "호스트 연산", "Find": "찾기",
  "No fault found: ids, dependencies, cycles, and collectives across ranks.": "결함 없음: 식별자, 의존성, 순환, 랭크 간 집합 통신.",
  "faults": "개 결함", "from": "보내는 랭크", "to": "받는 랭크", "fastest": "가장 빠른 것", "bus": "버스 대역폭",
  "start": "시작", "duration": "길이", "change": "변화", "step": "스텝", "loss": "손실", "memory": "메모리",
  "difference": "차이", "group": "그룹", "gaps": "빈틈", "Longest gaps": "가장 긴 빈틈", "Rows above": "위 행", "Rows below": "아래 행", "before": "다음 작업", "on critical path": "임계 경로 위",
  "What a rank's results take, from their making to their last use": "결과가 만들어져 마지막으로 쓰일 때까지 차지하는 크기",
  "capacity": "용량", "peak": "최고", "Nothing was timed: run `meshloom simulate` or record a step.": "시간 정보가 없습니다: `meshloom simulate`를 돌리거나 스텝을 기록하세요.",
  "Drag or arrow keys move, Ctrl + wheel or + and − zoom, 0 shows all, n and p step through slices.": "끌기·화살표로 이동, Ctrl+휠 또는 +/−로 확대·축소, 0은 전체, n·p는 다음·이전 조각.",
  "Bytes each rank sends to each other, collectives as a ring moves them": "랭크끼리 주고받는 바이트(집합 통신은 고리 방식으로 계산)",
  "FLOP a byte": "바이트당 연산", "added": "추가", "removed": "삭제", "changed": "변경", "slower": "느려짐", "faster": "빨라짐",
  "same": "같음", "Differences": "차이", "what the training held at each step": "학습 스텝마다 쓴 메모리", "tokens/s": "초당 토큰",
  "finished": "끝남", "running": "실행 중", "failed": "실패", "stopped": "멈춤", "starting": "시작 중", "forward": "순전파",
  "backward": "역전파", "optimizer": "옵티마이저", "gemm": "행렬곱", "attention": "어텐션", "where it was predicted": "예측 기준",
  "Runs": "실행 목록", "Compare": "비교", "started": "시작 시각", "devices, by stage and group": "단계와 그룹별 장치", "kept free": "추적 없음",
};
let language = "en";
const t = (text) => (language === "ko" && KOREAN[text]) || text;

function si(value, unit) {
  if (value === null || value === undefined) return "";
  for (const [factor, prefix] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= factor) return (value / factor).toFixed(2) + " " + prefix + unit;
  }
  return (Number.isInteger(value) ? value : value.toFixed(2)) + " " + unit;
}
function duration(ns) {
  if (ns === null || ns === undefined) return "";
  const size = Math.abs(ns);
  if (size >= 1e9) return (ns / 1e9).toFixed(3) + " s";
  if (size >= 1e6) return (ns / 1e6).toFixed(3) + " ms";
  if (size >= 1e3) return (ns / 1e3).toFixed(2) + " µs";
  return Math.round(ns) + " ns";
}
const brief = (text) => text.replace(/\.0+ /, " ").replace(/(\.\d*[1-9])0+ /, "$1 ");
const SHOWN = {
  text: (value) => String(value ?? ""), word: (value) => t(String(value ?? "")), int: (value) => value === null ? "" : value.toLocaleString("en"),
  ns: duration, bytes: (value) => si(value, "B"), flops: (value) => si(value, "FLOP"), bus: (value) => value ? si(value, "B/s") : "",
  share: (value) => value === null ? "" : (100 * value).toFixed(1) + " %", number: (value) => value === null ? "" : String(Math.round(1000 * value) / 1000),
};
// Everything from a trace becomes text nodes only: a trace is untrusted.
function make(tag, facts, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(facts || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name === "style") element.style.cssText = value;
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) element.append(child);
  return element;
}
const SVG = "http://www.w3.org/2000/svg";
function draw(tag, facts, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(facts || {})) element.setAttribute(name, value);
  for (const child of children.flat()) if (child !== null && child !== undefined) element.append(child);
  return element;
}
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
